"""Best-fit packing: packs documents into sequences with little padding and few truncations.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830, section 3: documents longer than a
sequence are split into full sequences and a remainder. Documents and remainders, in order of decreasing length, go into
the sequence with the least sufficient room.
"""

import dataclasses
import itertools
import pathlib

import numpy as np

from moejax.data.appearing import appearing
from moejax.data.integrity import Verified, file_hash
from moejax.errors import UserError, reason

HASHES = "hashes.npy"
"""File with the hashes of the arrays of a plan."""


@dataclasses.dataclass(frozen=True, eq=False)
class PackingPlan:
  """The pieces of a stream that make up each of b sequences."""

  bounds: np.ndarray
  """int64 [b + 1]: index of the first piece of each sequence, then the number of pieces (p)."""
  starts: np.ndarray
  """int64 [p]: token index of the first input of each piece."""
  lengths: np.ndarray
  """int64 [p]: number of inputs of each piece."""

  def __len__(self) -> int:
    return len(self.bounds) - 1

  def pieces(self, index: int) -> list[tuple[int, int]]:
    """(start, length) of the pieces of sequence `index`, in order."""
    piece = slice(self.bounds[index], self.bounds[index + 1])
    return list(zip(self.starts[piece].tolist(), self.lengths[piece].tolist(), strict=True))


def make_plan(document_starts: np.ndarray, sequence_length: int) -> PackingPlan:
  """The plan of a stream whose documents begin at `document_starts` int64 [d + 1].

  A document of n tokens has n - 1 inputs, since the last token has no target.
  """
  inputs = np.diff(document_starts) - 1
  whole, rest = inputs // sequence_length, inputs % sequence_length
  # The pieces: first all that fill a sequence, then all remainders.
  document = np.repeat(np.arange(len(inputs)), whole)
  within = np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)
  shorter = np.flatnonzero(rest)
  starts = np.r_[
    document_starts[:-1][document] + within * sequence_length,
    document_starts[:-1][shorter] + whole[shorter] * sequence_length,
  ]
  lengths = np.r_[np.full(len(document), sequence_length), rest[shorter]]
  bins = np.r_[np.arange(len(document)), len(document) + best_fit(rest[shorter], sequence_length)]
  order = np.argsort(bins, kind="stable")
  counts = np.bincount(bins) if len(bins) else np.zeros(0, np.int64)
  return PackingPlan(np.r_[0, np.cumsum(counts)], starts[order], lengths[order])


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
  """Returns int64 [n], a bin for each length (1 to capacity), by best fit decreasing. Bins are numbered from 0.

  Items of equal length are placed together: the bins with the least sufficient room take as many as fit before the next
  bins are considered, which gives the same result as one item at a time.
  """
  bins = np.zeros(len(lengths), np.int64)
  room: dict[int, list[np.ndarray]] = {}  # bins by their remaining room
  rooms = 0  # bit r is set if a bin has room r, so that the least sufficient room is found in one step
  num_bins = 0
  order = np.argsort(-lengths, kind="stable")
  edges = np.flatnonzero(np.diff(lengths[order], prepend=0, append=0))
  for first, stop in itertools.pairwise(edges):
    items = order[first:stop]
    length = int(lengths[items[0]])
    while len(items):
      sufficient = rooms >> length
      if sufficient:
        free = length + (sufficient & -sufficient).bit_length() - 1
        open_bins = np.concatenate(room.pop(free))
        rooms ^= 1 << free
      else:
        free = capacity
        open_bins = np.arange(num_bins, num_bins - (-len(items) // (capacity // length)))
        num_bins += len(open_bins)
      each = free // length
      used = min(len(open_bins), -(-len(items) // each))
      placed = min(len(items), used * each)
      bins[items[:placed]] = np.repeat(open_bins[:used], each)[:placed]
      last = placed - (used - 1) * each  # how many the last bin took
      left = ((free - each * length, open_bins[: used - 1]), (free - last * length, open_bins[used - 1 : used]))
      for now_free, now in (*left, (free, open_bins[used:])):
        if now_free and len(now):
          room.setdefault(now_free, []).append(now)
          rooms |= 1 << now_free
      items = items[placed:]
  return bins


def cached_plan(folder: pathlib.Path, document_starts: np.ndarray, sequence_length: int) -> PackingPlan:
  """The plan in `folder`, which is computed and written if it is missing, and memory-mapped.

  Raises:
    UserError: If a file is damaged.
  """
  fields = [field.name for field in dataclasses.fields(PackingPlan)]
  if not folder.is_dir():
    plan = make_plan(document_starts, sequence_length)
    with appearing(folder) as part:
      for name in fields:
        np.save(part / f"{name}.npy", getattr(plan, name))
      np.save(part / HASHES, [file_hash(part / f"{name}.npy") for name in fields])
  remedy = f"delete {folder} and run again to compute it again"
  try:
    hashes = np.load(folder / HASHES, allow_pickle=False).tolist()
    expected = dict(zip(fields, hashes, strict=True))
  except (OSError, ValueError, TypeError, EOFError) as error:
    raise UserError(f"{folder / HASHES} is damaged ({reason(error)[:100]}); {remedy}") from error
  verified = Verified(folder)
  for name in fields:
    verified.check(folder / f"{name}.npy", str(expected[name]), file_hash, remedy)
  return PackingPlan(*(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in fields))
