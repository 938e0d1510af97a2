"""Best-fit packing, against the plain algorithm."""

import itertools

import numpy as np
import pytest

from moejax.data.best_fit import best_fit, cached_plan, make_plan
from moejax.errors import UserError


def plain(lengths, capacity):
  """Best fit decreasing, one at a time; of bins with equal room the one that got it first."""
  bins = np.zeros(len(lengths), np.int64)
  room: list[list[int]] = [[] for _ in range(capacity + 1)]
  count = 0
  for item in np.argsort(-lengths, kind="stable"):
    free = next((r for r in range(lengths[item], capacity + 1) if room[r]), None)
    if free is None:
      bins[item], free, count = count, capacity, count + 1
    else:
      bins[item] = room[free].pop(0)
    room[free - lengths[item]].append(int(bins[item]))
  return bins


@pytest.mark.parametrize("capacity", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_bins_are_filled_as_the_plain_algorithm_fills_them(capacity, count):
  lengths = np.random.default_rng(capacity + count).integers(1, capacity + 1, count)
  bins = best_fit(lengths, capacity)
  fill, expected = (np.bincount(b, weights=lengths) for b in (bins, plain(lengths, capacity)))
  assert (fill <= capacity).all() and (fill > 0).all()
  np.testing.assert_array_equal(np.sort(fill), np.sort(expected))
  if count:
    assert sorted(set(bins.tolist())) == list(range(len(fill)))


def test_a_small_case_by_hand():
  # 5 alone leaves 3 for 3; 4 and 4 make one; 2 goes to the least room that holds it.
  assert best_fit(np.array([2, 4, 3, 5, 4]), 8).tolist() == [2, 1, 0, 0, 1]


@pytest.mark.parametrize("length", [1, 3, 8, 50])
def test_a_plan_has_every_input_once_and_cuts_only_what_is_longer_than_a_sequence(length):
  sizes = np.random.default_rng(length).integers(1, 40, 200)
  starts = np.r_[0, np.cumsum(sizes)]
  plan = make_plan(starts, length)
  pieces = [piece for index in range(len(plan)) for piece in plan.pieces(index)]
  assert all(sum(size for _, size in plan.pieces(index)) <= length for index in range(len(plan)))
  covered = sorted(token for start, size in pieces for token in range(start, start + size))
  assert covered == [token for start, stop in itertools.pairwise(starts) for token in range(start, stop - 1)]
  cuts = {start for start, _ in pieces} - set(starts.tolist())
  document = np.repeat(np.arange(len(sizes)), sizes)
  assert all((start - starts[document[start]]) % length == 0 for start in cuts)


def test_documents_of_one_token_have_no_input():
  plan = make_plan(np.array([0, 1, 2]), 8)
  assert len(plan) == 0


def test_a_plan_is_made_once_and_then_read(tmp_path):
  starts = np.arange(0, 90, 9)
  made = cached_plan(tmp_path / "plan", starts, 16)
  read = cached_plan(tmp_path / "plan", None, 16)
  assert isinstance(read.starts, np.memmap)
  for name in ("bounds", "starts", "lengths"):
    np.testing.assert_array_equal(getattr(made, name), getattr(read, name))
  assert [made.pieces(i) for i in range(len(made))] == [[(start, 8), (start + 9, 8)] for start in range(0, 72, 18)] + [
    [(72, 8)]
  ]


@pytest.mark.parametrize("name", ["bounds.npy", "starts.npy", "lengths.npy", "hashes.npy"])
def test_a_damaged_plan_is_named(tmp_path, name):
  path = tmp_path / "plan" / name
  cached_plan(path.parent, np.arange(0, 90, 9), 16)
  content = path.read_bytes()
  for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:40], b"", None):
    path.unlink() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"plan/\w+\.npy (is damaged|cannot be read).*delete .*plan and run again"):
      cached_plan(path.parent, None, 16)


def test_a_million_documents_take_seconds():
  lengths = np.random.default_rng(0).lognormal(6, 1, 1_000_000).astype(int).clip(1, 2048)
  bins = best_fit(lengths, 2048)
  assert lengths.sum() / (2048 * (bins.max() + 1)) > 0.99
