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
  """Endless batches of packing's examples, from `start_step` on; threads read data.prefetch batches ahead.

  The batch at a step is a function of data.seed and the step alone. Each epoch reshuffles all windows; a batch may
  straddle two epochs. With weights each stream has epochs of its own, and every stretch of rows has the streams in
  these proportions, to within a per cent. Whatever `rows` a process asks for, they are those of the same batch.

  `get_state()` is a small dict for JSON, and `set_state(state)` resumes from it, bit for bit; `close()` frees the
  threads, which otherwise end with the iterator or the interpreter.

  Args:
    mixture: what to train on.
    data: seed and prefetch.
    batch_size: rows over all processes (B).
    rows: which of them this process needs, in this order; None takes all.
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
  """The batch [rows, T] of every step, which `train_batches` yields in order. Indexing it reads that batch alone."""
  rows = range(batch_size) if rows is None else rows
  place = row_places(mixture, data.seed)

  def example(row: int) -> Example:
    stream, index = place(row)
    return mixture.windows[stream][index]

  return grain.MapDataset.range(_ENDLESS).map(lambda step: stack([example(step * batch_size + row) for row in rows]))


def evaluation_batches(
  stream: TokenStream, sequence_length: int, batch_size: int, max_tokens: int | None
) -> Iterator[Example]:
  """Batches [B, T] that score the stream's first `max_tokens` targets, or all, once each and in order.

  The validation stream is in the order of a hash of its documents, so that its beginning is a fair sample. The last
  window and the last batch are filled up with padding (segments 0, weights 0, documents -1). Every process reads them
  whole.
  """
  for step in range(num_evaluation_batches(stream, sequence_length, batch_size, max_tokens)):
    windows = range(step * batch_size, (step + 1) * batch_size)
    yield stack([evaluation_window(stream, window, sequence_length, max_tokens) for window in windows])


def num_evaluation_batches(stream: TokenStream, sequence_length: int, batch_size: int, max_tokens: int | None) -> int:
  """How many batches evaluation_batches yields."""
  return -(-num_evaluation_windows(stream, sequence_length, max_tokens) // batch_size)


def row_places(mixture: Mixture, seed: int) -> Callable[[int], tuple[int, int]]:
  """Which example row n of training is, counted over all steps: its stream, and its index among that one's windows."""
  return _weighted(mixture, seed) if mixture.weights else _pooled(mixture, seed)


def _pooled(mixture: Mixture, seed: int) -> Callable[[int], tuple[int, int]]:
  """From one shuffle over the windows of all streams."""
  ends = list(itertools.accumulate(map(len, mixture.windows)))
  # Index shuffling is a cipher: no permutation is stored, and any epoch is reached at once.
  order = grain.MapDataset.range(ends[-1]).shuffle(seed=_shuffle_seed(str(seed))).repeat()

  def place(row: int) -> tuple[int, int]:
    index = order[row]
    stream = bisect_right(ends, index)
    return stream, index - ends[stream] + len(mixture.windows[stream])

  return place


def _weighted(mixture: Mixture, seed: int) -> Callable[[int], tuple[int, int]]:
  """From the stream whose turn it is, each in a shuffle of its own."""
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
  """A hash, because grain shuffles epoch e by seed + e: seeds 0 and 1 would share all epochs but one."""
  return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big")
