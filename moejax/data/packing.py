"""Windows of a token stream as examples: inputs, targets, and what keeps documents apart.

An example is a dict of arrays [T], int32 unless said otherwise:
  tokens     inputs
  targets    the token after each input
  segments   1, 2, ... by document in this window, 0 on padding: attention stays within a segment
  positions  from 0 at each document's first token in this window: attention cannot see before the window either
  weights    float32, 1 where the target belongs to the input's document; 0 where it is the next document's BEGIN, which
             nothing before it predicts, and on padding
  documents  (evaluation only) index of the target's document in the stream, -1 on padding
"""

import numpy as np

from moejax.data.token_stream import TokenStream
from moejax.errors import UserError

Example = dict[str, np.ndarray]


def num_train_windows(stream: TokenStream, sequence_length: int) -> int:
  """Whole windows in the stream; the rest of it, shorter than one, is not trained on.

  Raises:
    UserError: there is none.
  """
  windows = (len(stream) - 1) // sequence_length
  if not windows:
    raise UserError(
      f"the training text has {len(stream)} tokens, fewer than the data.sequence_length + 1 = {sequence_length + 1} "
      "of one sequence; train on more text or shorten data.sequence_length"
    )
  return windows


def train_window(stream: TokenStream, index: int, sequence_length: int) -> Example:
  """Window `index`: T inputs from token index * T on. So each token but the first is a target once in an epoch."""
  example = _window(stream, index * sequence_length, sequence_length)
  del example["documents"]
  return example


def num_targets(stream: TokenStream, max_tokens: int | None) -> int:
  """Targets that evaluation looks at: those of the stream's first tokens, whatever the sequence length.

  Next documents' BEGINs count here, though their weight is 0. The validation stream is in the order of a hash, so the
  first tokens are a fair sample of all.
  """
  available = len(stream) - 1
  return available if max_tokens is None else min(available, max_tokens)


def num_evaluation_windows(stream: TokenStream, sequence_length: int, max_tokens: int | None) -> int:
  """Windows that cover the targets of evaluation; the last may be padded."""
  return -(-num_targets(stream, max_tokens) // sequence_length)


def evaluation_window(stream: TokenStream, index: int, sequence_length: int, max_tokens: int | None) -> Example:
  """Window `index` as in training, with `documents`, padded beyond the last target: all of a window beyond it."""
  start = index * sequence_length
  length = min(sequence_length, num_targets(stream, max_tokens) - start)
  if length == sequence_length:
    return _window(stream, start, length)
  example = _padding(sequence_length, stream.padding)
  if length > 0:
    for name, values in _window(stream, start, length).items():
      example[name][:length] = values
  return example


def stack(examples: list[Example]) -> Example:
  """One batch [B, T] from B examples."""
  return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _window(stream: TokenStream, start: int, length: int) -> Example:
  tokens, documents = stream.slice(start, start + length + 1)
  inputs = documents[:-1]
  index = np.arange(length, dtype=np.int32)
  opens = np.r_[True, inputs[1:] != inputs[:-1]]
  return {
    "tokens": tokens[:-1],
    "targets": tokens[1:],
    "segments": inputs - inputs[0] + 1,
    "positions": index - np.maximum.accumulate(np.where(opens, index, 0)),
    "weights": (documents[1:] == inputs).astype(np.float32),
    "documents": documents[1:],
  }


def _padding(length: int, padding: int) -> Example:
  example = {name: np.zeros(length, np.int32) for name in ("segments", "positions")}
  example |= {name: np.full(length, padding, np.int32) for name in ("tokens", "targets")}
  return example | {"weights": np.zeros(length, np.float32), "documents": np.full(length, -1, np.int32)}
