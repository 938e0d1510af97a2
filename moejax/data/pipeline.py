"""Batches for training and evaluation. The only file of this package that imports grain."""

import functools
import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import grain

from moejax.config.data import Data
from moejax.data.mixture import Mixture
from moejax.data.packing import Example, evaluation_window, num_evaluation_windows, stack
from moejax.data.token_stream import TokenStream

_THREADS = 4
_ENDLESS = 2**62


def train_batches(
  mixture: Mixture,
  data: Data,
  batch_size: int,
  rows: Sequence[int] | None = None,
  start_step: int = 0,
) -> grain.DatasetIterator[Example]:
  """Returns an infinite iterator of training batches. Threads read data.prefetch batches ahead.

  The batch at a step depends only on data.seed and the step. Windows are reshuffled in each epoch, and a batch may
  contain the end of one epoch and the start of the next. With weights, each stream has its own epochs, and any range of
  rows has the streams in proportion to the weights, to within one percent. The batch does not depend on `rows`.

  `get_state()` returns a small dictionary for JSON, and `set_state(state)` resumes exactly from it. `close()` ends the
  threads, which otherwise end with the iterator or the interpreter.

  Args:
    mixture: windows and weights.
    data: seed and prefetch.
    batch_size: number of rows over all processes (B).
    rows: the rows that this process needs, in this order. None reads all rows.
    start_step: step of the first batch.
  """
  batches = batches_by_step(mixture, data, batch_size, rows)
  options = grain.ReadOptions(num_threads=min(_THREADS, data.prefetch), prefetch_buffer_size=data.prefetch)
  iterator = iter(batches.to_iter_dataset(options))
  grain.experimental.set_next_index(iterator, start_step)
  return iterator


def batches_by_step(
  mixture: Mixture, data: Data, batch_size: int, rows: Sequence[int] | None = None
) -> grain.MapDataset[Example]:
  """The batches [rows, T] of `train_batches` by step. Indexing reads only the requested batch."""
  rows = range(batch_size) if rows is None else rows
  place = row_places(mixture, data.seed)

  def example(row: int) -> Example:
    stream, index = place(row)
    return mixture.windows[stream][index]

  return grain.MapDataset.range(_ENDLESS).map(lambda step: stack([example(step * batch_size + row) for row in rows]))


def evaluation_batches(
  stream: TokenStream, sequence_length: int, batch_size: int, max_tokens: int | None
) -> Iterator[Example]:
  """Yields batches [B, T] that contain each of the first `max_tokens` targets of the stream (None: all) once, in order.

  Since the validation stream is ordered by a hash of its documents, its first tokens are a random sample. The last
  window and the last batch are padded (segments 0, weights 0, documents -1). Every process reads all rows.
  """
  for step in range(num_evaluation_batches(stream, sequence_length, batch_size, max_tokens)):
    windows = range(step * batch_size, (step + 1) * batch_size)
    yield stack([evaluation_window(stream, window, sequence_length, max_tokens) for window in windows])


def num_evaluation_batches(stream: TokenStream, sequence_length: int, batch_size: int, max_tokens: int | None) -> int:
  """Number of batches that `evaluation_batches` yields."""
  return -(-num_evaluation_windows(stream, sequence_length, max_tokens) // batch_size)


def row_places(mixture: Mixture, seed: int) -> Callable[[int], tuple[int, int]]:
  """Returns a function that maps training row n, counted over all steps, to its stream and the index of its window."""
  return _weighted(mixture, seed) if mixture.weights else _pooled(mixture, seed)


def _pooled(mixture: Mixture, seed: int) -> Callable[[int], tuple[int, int]]:
  """Shuffles the windows of all streams together."""
  ends = list(itertools.accumulate(map(len, mixture.windows)))
  # The shuffle computes indices without storing a permutation, so any epoch can be accessed directly.
  order = grain.MapDataset.range(ends[-1]).shuffle(seed=_shuffle_seed(str(seed))).repeat()

  def place(row: int) -> tuple[int, int]:
    index = order[row]
    stream = bisect_right(ends, index)
    return stream, index - ends[stream] + len(mixture.windows[stream])

  return place


def _weighted(mixture: Mixture, seed: int) -> Callable[[int], tuple[int, int]]:
  """Interleaves the streams according to their weights. Each stream is shuffled separately."""
  orders = [
    grain.MapDataset.range(len(windows))
    .shuffle(seed=_shuffle_seed(f"{seed} {stream}"))
    .repeat()
    .map(functools.partial(_place, stream))
    for stream, windows in enumerate(mixture.windows)
  ]
  return grain.MapDataset.mix(orders, weights=mixture.weights).__getitem__


def _place(stream: int, index: int) -> tuple[int, int]:
  return stream, index


def _shuffle_seed(seed: str) -> int:
  """Hashes the seed, because grain uses seed + e for epoch e, so that seeds 0 and 1 would have most epochs in
  common."""
  return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big")
