"""Makes examples from windows of a token stream: inputs, targets, segments, positions and weights.

An example is a dict of arrays [T], which are int32 unless noted otherwise:
  tokens     inputs
  targets    the token after each input
  segments   1, 2, ... by document in this window, 0 on padding: attention stays within a segment
  positions  position in the segment, starting at 0
  weights    float32, 1 if the target belongs to the document of the input; 0 if it is the BEGIN of the next document,
             which cannot be predicted, if it is part of the prefix of its document, and on padding
  documents  (evaluation only) index of the target's document in the stream, -1 on padding
"""

import dataclasses
from typing import Protocol

import numpy as np

from moejax.data.best_fit import PackingPlan
from moejax.data.token_stream import TokenStream
from moejax.errors import UserError

Example = dict[str, np.ndarray]


class Windows(Protocol):
  """The training examples of a stream by index: a random-access data source of grain."""

  def __len__(self) -> int: ...
  def __getitem__(self, index: int, /) -> Example: ...
  def num_predicted(self, indices: np.ndarray) -> np.ndarray:
    """int64 [n]: the sum of the weights of each of the examples `indices` [n], computed without reading tokens."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class Concatenated:
  """Consecutive windows of T inputs, independently of document boundaries. Window i starts at token i * T.

  Each token except the first is a target once per epoch. The last tokens of the stream, which do not fill a window, are
  not used.

  Raises:
    UserError: If the stream is shorter than one window.
  """

  stream: TokenStream
  sequence_length: int

  def __post_init__(self) -> None:
    if not len(self):
      raise UserError(
        f"the training text has {len(self.stream)} tokens, fewer than the data.sequence_length + 1 = "
        f"{self.sequence_length + 1} of one sequence; use more text or lower data.sequence_length"
      )

  def __len__(self) -> int:
    return (len(self.stream) - 1) // self.sequence_length

  def __getitem__(self, index: int) -> Example:
    example = _window(self.stream, index * self.sequence_length, self.sequence_length)
    del example["documents"]
    return example

  def num_predicted(self, indices: np.ndarray) -> np.ndarray:
    first = indices * self.sequence_length
    return self.stream.num_predicted(first, first + self.sequence_length)


@dataclasses.dataclass(frozen=True, eq=False)
class BestFit:
  """Windows of whole documents, or pieces of T inputs of longer ones, and padding (see best_fit).

  Each token except BEGIN is a target once per epoch.
  """

  stream: TokenStream
  sequence_length: int
  plan: PackingPlan

  def __post_init__(self) -> None:
    if not len(self):
      raise UserError("the training text has no document of more than one token, so nothing to predict; use more text")

  def __len__(self) -> int:
    return len(self.plan)

  def __getitem__(self, index: int) -> Example:
    example = _padding(self.sequence_length, self.stream.padding)
    del example["documents"]
    at = 0
    for number, (start, length) in enumerate(self.plan.pieces(index), 1):
      piece = _window(self.stream, start, length)
      piece["segments"][:] = number
      for name, values in example.items():
        values[at : at + length] = piece[name]
      at += length
    return example

  def num_predicted(self, indices: np.ndarray) -> np.ndarray:
    first, counts = self.plan.bounds[indices], self.plan.bounds[indices + 1] - self.plan.bounds[indices]
    begin = np.cumsum(counts) - counts  # of each example's pieces among all of them
    piece = np.arange(counts.sum()) + np.repeat(first - begin, counts)
    inputs = self.plan.starts[piece]
    return np.add.reduceat(self.stream.num_predicted(inputs, inputs + self.plan.lengths[piece]), begin)


def num_targets(stream: TokenStream, max_tokens: int | None) -> int:
  """Number of targets in evaluation: those of the first tokens of the stream, independently of the sequence length.

  BEGIN tokens are counted, although their weight is 0. Since the validation stream is ordered by a hash, the first
  tokens are a random sample.
  """
  available = len(stream) - 1
  return available if max_tokens is None else min(available, max_tokens)


def num_evaluation_windows(stream: TokenStream, sequence_length: int, max_tokens: int | None) -> int:
  """Number of windows that contain the targets of evaluation. The last window may be padded."""
  return -(-num_targets(stream, max_tokens) // sequence_length)


def evaluation_window(stream: TokenStream, index: int, sequence_length: int, max_tokens: int | None) -> Example:
  """Window `index` as in training, with `documents`, and with padding after the last target."""
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
  opens = np.ones(length, bool)
  np.not_equal(inputs[1:], inputs[:-1], out=opens[1:])
  return {
    "tokens": tokens[:-1],
    "targets": tokens[1:],
    "segments": inputs - inputs[0] + 1,
    "positions": index - np.maximum.accumulate(np.where(opens, index, 0)),
    "weights": _weights(stream, start, documents),
    "documents": documents[1:],
  }


def _weights(stream: TokenStream, start: int, documents: np.ndarray) -> np.ndarray:
  """Weights of the inputs from `start` on. `documents` [length + 1] are those of the inputs and of the last target."""
  same = documents[1:] == documents[:-1]
  if stream.prefixes is not None:
    same &= stream.predicted(start + 1, documents[1:])
  return same.astype(np.float32)


def _padding(length: int, padding: int) -> Example:
  example = {name: np.zeros(length, np.int32) for name in ("segments", "positions")}
  example |= {name: np.full(length, padding, np.int32) for name in ("tokens", "targets")}
  return example | {"weights": np.zeros(length, np.float32), "documents": np.full(length, -1, np.int32)}
