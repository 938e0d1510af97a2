"""Rounds lengths up to a few buckets, so that few programs are compiled."""

from collections.abc import Iterator, Sequence

SMALLEST = 16


def bucket(length: int) -> int:
  """The smallest of 16, 24, 32, 48, 64, 96, 128, ... that is at least `length`."""
  size = SMALLEST
  while size < length:
    if size * 3 // 2 >= length:
      return size * 3 // 2
    size *= 2
  return size


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
  """Yields indices in batches of similar length. The longest come first, so that a lack of memory is noticed early."""
  order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
  for start in range(0, len(order), batch_size):
    yield order[start : start + batch_size]
