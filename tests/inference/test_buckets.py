"""Few lengths, little padding."""

from moejax.inference.buckets import batches_by_length, bucket


def test_a_bucket_holds_its_length_and_wastes_at_most_half():
  for length in range(1, 5000):
    assert length <= bucket(length) <= max(16, 1.5 * length)


def test_buckets_are_few():
  assert len({bucket(length) for length in range(1, 4097)}) == 17


def test_batches_hold_every_index_once_the_longest_first():
  batches = list(batches_by_length([3, 9, 1, 9, 4], 2))
  assert batches == [[1, 3], [4, 0], [2]]
