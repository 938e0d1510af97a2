"""Batches for training and evaluation. The only file of this package that imports grain."""

import hashlib
from collections.abc import Iterator

import grain

from moejax.config.data import Data
from moejax.data.packing import (
  Example,
  evaluation_window,
  num_evaluation_windows,
  num_train_windows,
  stack,
  train_window,
)
from moejax.data.token_stream import TokenStream
from moejax.errors import UserError

_THREADS = 4
_ENDLESS = 2**62


def train_batches(
  stream: TokenStream,
  data: Data,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  start_step: int = 0,
) -> grain.DatasetIterator[Example]:
  """Endless batches of packing's examples, from `start_step` on; threads read data.prefetch batches ahead.

  The batch at a step is a function of data.seed and the step alone. Each epoch shuffles all windows anew; a batch may
  straddle two epochs. Process p of P yields rows p * B / P to (p + 1) * B / P of the same B rows, in order.

  `get_state()` is a small dict for JSON, and `set_state(state)` goes on from it, bit for bit; `close()` frees the
  threads, which otherwise end with the iterator or the interpreter.

  Args:
    stream: tokens to train on.
    data: sequence_length (T), seed and prefetch.
    batch_size: rows over all processes (B).
    process_index: this process (p).
    process_count: all processes (P).
    start_step: step of the first batch.

  Raises:
    UserError: the stream has less than one window, or the processes do not divide the batch.
  """
  batches = _batches_by_step(stream, data, batch_size, process_index, process_count)
  options = grain.ReadOptions(num_threads=min(_THREADS, data.prefetch), prefetch_buffer_size=data.prefetch)
  iterator = iter(batches.to_iter_dataset(options))
  grain.experimental.set_next_index(iterator, start_step)
  return iterator


def batch_at(
  step: int, stream: TokenStream, data: Data, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Example:
  """The batch [B / P, T] that train_batches yields at `step`."""
  return _batches_by_step(stream, data, batch_size, process_index, process_count)[step]


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


def _batches_by_step(
  stream: TokenStream, data: Data, batch_size: int, process_index: int, process_count: int
) -> grain.MapDataset[Example]:
  rows = _rows(batch_size, process_index, process_count)
  windows = num_train_windows(stream, data.sequence_length)
  # Index shuffling is a cipher: no permutation is stored, and any epoch is reached at once.
  order = grain.MapDataset.range(windows).shuffle(seed=_shuffle_seed(data.seed)).repeat()

  def batch(step: int) -> Example:
    return stack([train_window(stream, order[step * batch_size + row], data.sequence_length) for row in rows])

  return grain.MapDataset.range(_ENDLESS).map(batch)


def _rows(batch_size: int, process_index: int, process_count: int) -> range:
  """The rows of the global batch that belong to this process: consecutive, as MoE routing groups are."""
  if batch_size % process_count:
    raise UserError(
      f"batch_size={batch_size} is not divisible by the {process_count} processes that read it; "
      f"use a multiple of {process_count}"
    )
  per_process = batch_size // process_count
  return range(process_index * per_process, (process_index + 1) * per_process)


def _shuffle_seed(seed: int) -> int:
  """A hash, because grain shuffles epoch e by seed + e: seeds 0 and 1 would share all epochs but one."""
  return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
