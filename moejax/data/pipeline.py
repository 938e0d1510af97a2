"""Batches for training and evaluation. The only file of this package that imports grain."""

import functools
import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator

import grain

from moejax.config.data import Data
from moejax.data.mixture import Mixture
from moejax.data.packing import Example, evaluation_window, num_evaluation_windows, stack
from moejax.data.token_stream import TokenStream
from moejax.errors import UserError

_THREADS = 4
_ENDLESS = 2**62


def train_batches(
  mixture: Mixture,
  data: Data,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  start_step: int = 0,
) -> grain.DatasetIterator[Example]:
  """Endless batches of packing's examples, from `start_step` on; threads read data.prefetch batches ahead.

  The batch at a step is a function of data.seed and the step alone. Each epoch reshuffles all windows; a batch may
  straddle two epochs. With weights each stream has epochs of its own, and every stretch of rows has the streams in
  these proportions, to within a per cent. Process p of P yields rows p * B / P to (p + 1) * B / P of the same B rows,
  in order.

  `get_state()` is a small dict for JSON, and `set_state(state)` resumes from it, bit for bit; `close()` frees the
  threads, which otherwise end with the iterator or the interpreter.

  Args:
    mixture: what to train on.
    data: seed and prefetch.
    batch_size: rows over all processes (B).
    process_index: this process (p).
    process_count: all processes (P).
    start_step: step of the first batch.

  Raises:
    UserError: the processes do not divide the batch.
  """
  batches = batches_by_step(mixture, data, batch_size, process_index, process_count)
  options = grain.ReadOptions(num_threads=min(_THREADS, data.prefetch), prefetch_buffer_size=data.prefetch)
  iterator = iter(batches.to_iter_dataset(options))
  grain.experimental.set_next_index(iterator, start_step)
  return iterator


def batches_by_step(
  mixture: Mixture, data: Data, batch_size: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset[Example]:
  """The batch [B / P, T] of every step, which `train_batches` yields in order. Indexing it reads that batch alone."""
  rows = _rows(batch_size, process_index, process_count)
  place = row_places(mixture, data.seed)

  def example(row: int) -> Example:
    stream, index = place(row)
    return mixture.windows[stream][index]

  return grain.MapDataset.range(_ENDLESS).map(lambda step: stack([example(step * batch_size + row) for row in rows]))


def evaluation_batches(
  stream: TokenStream,
  sequence_length: int,
  batch_size: int,
  max_tokens: int | None,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Example]:
  """Batches [B / P, T] that score the stream's first `max_tokens` targets, or all, once each and in order.

  The validation stream is in the order of a hash of its documents, so that its beginning is a fair sample. The last
  window and the last batch are filled up with padding (segments 0, weights 0, documents -1).

  Raises:
    UserError: the processes do not divide the batch.
  """
  rows = _rows(batch_size, process_index, process_count)

  def batches() -> Iterator[Example]:
    for step in range(num_evaluation_batches(stream, sequence_length, batch_size, max_tokens)):
      windows = (step * batch_size + row for row in rows)
      yield stack([evaluation_window(stream, window, sequence_length, max_tokens) for window in windows])

  return batches()


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


def _rows(batch_size: int, process_index: int, process_count: int) -> range:
  """The rows of the global batch that belong to this process: consecutive, as MoE routing groups are."""
  if batch_size % process_count:
    raise UserError(
      f"batch_size={batch_size} is not divisible by the {process_count} processes that read it; "
      f"use a multiple of {process_count}"
    )
  per_process = batch_size // process_count
  return range(process_index * per_process, (process_index + 1) * per_process)


def _shuffle_seed(seed: str) -> int:
  """A hash, because grain shuffles epoch e by seed + e: seeds 0 and 1 would share all epochs but one."""
  return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big")
