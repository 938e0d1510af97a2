"""A stream of tokens on disk: consecutive documents, each of which starts with BEGIN."""

import array
import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Protocol

import numpy as np

from moejax.errors import UserError


class Tokens(Protocol):
  """An array [n] of ids that supports slices."""

  def __len__(self) -> int: ...
  def __getitem__(self, where: slice, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStream:
  """A stream of n tokens in d documents."""

  tokens: Tokens
  """uint16 or uint32 [n], memory-mapped or in shards."""
  starts: np.ndarray
  """int64 [d + 1]: index of the BEGIN of each document, then n."""
  padding: int
  """Id of padding."""
  prefixes: np.ndarray | None = None
  """int64 [d]: number of tokens after each BEGIN that are not predicted. None if there are none."""

  def __len__(self) -> int:
    return len(self.tokens)

  @property
  def num_documents(self) -> int:
    """The number of documents (d)."""
    return len(self.starts) - 1

  def slice(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [stop - start] and, for each, the index of its document int32 [stop - start]."""
    assert 0 <= start < stop <= len(self), (start, stop, len(self))
    first = np.searchsorted(self.starts, start, side="right") - 1
    last = np.searchsorted(self.starts, stop, side="left")
    # BEGINs inside the slice. This reads only a part of `starts`.
    documents = np.zeros(stop - start, np.int32)
    documents[self.starts[first + 1 : last] - start] = 1
    documents[0] = first
    return self.tokens[start:stop].astype(np.int32), np.cumsum(documents, dtype=np.int32)

  def predicted(self, start: int, documents: np.ndarray) -> np.ndarray:
    """bool [n]: whether each token from `start` on is after the prefix of its document, given the `documents` [n]."""
    assert self.prefixes is not None
    return np.arange(start, start + len(documents)) - self.starts[documents] > self.prefixes[documents]

  def num_predicted(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """int64 [n]: number of tokens after `first` [n] up to `last` [n] that are predicted, without BEGIN and prefixes."""
    return last - first - (self._num_given(last) - self._num_given(first))

  def _num_given(self, last: np.ndarray) -> np.ndarray:
    """int64 [n]: number of tokens up to `last` [n] that are not predicted."""
    document = np.searchsorted(self.starts, last, side="right") - 1
    if self.prefixes is None:
      return document + 1  # the BEGIN of each
    given, before = self._given
    return before[document] + np.minimum(last - self.starts[document] + 1, given[document])

  @functools.cached_property
  def _given(self) -> tuple[np.ndarray, np.ndarray]:
    """int64 [d]: number of tokens of each document that are not predicted, and of all documents before it."""
    assert self.prefixes is not None
    given = 1 + np.minimum(self.prefixes, np.diff(self.starts) - 1)
    return given, np.cumsum(given) - given


class StreamWriter:
  """Context manager that writes a stream, document by document. The files are complete when it exits."""

  def __init__(self, folder: pathlib.Path, name: str, vocab_size: int):
    self._dtype = token_dtype(vocab_size)
    self._tokens = (folder / f"{name}.tokens").open("wb")
    self._starts = (folder / f"{name}.starts").open("wb")
    self.keys = array.array("Q")
    """tokens_key of each document."""
    self.num_tokens = 0

  @property
  def num_documents(self) -> int:
    """The number of documents so far."""
    return len(self.keys)

  def add(self, *tokens: np.ndarray) -> None:
    """Appends a document. Its tokens are given in parts [n1], [n2], ..."""
    self._starts.write(np.int64(self.num_tokens).astype("<i8").tobytes())
    for part in tokens:
      self._tokens.write(part.astype(self._dtype).tobytes())
      self.num_tokens += len(part)
    self.keys.append(tokens_key(*tokens))

  def __enter__(self) -> "StreamWriter":
    return self

  def __exit__(self, *_: object) -> None:
    self._starts.write(np.int64(self.num_tokens).astype("<i8").tobytes())
    for file in (self._tokens, self._starts):
      file.flush()
      # Synchronize, so that files are not empty if the machine crashes after the folder is renamed.
      os.fsync(file.fileno())
      file.close()


def open_stream(folder: pathlib.Path, name: str, vocab_size: int, padding: int) -> TokenStream:
  """Opens a stream that a StreamWriter wrote, memory-mapped.

  Raises:
    UserError: If the files are inconsistent.
  """
  try:
    tokens = np.memmap(folder / f"{name}.tokens", token_dtype(vocab_size), "r")
    starts = np.memmap(folder / f"{name}.starts", "<i8", "r")
    damage = None if starts[-1] == len(tokens) else f"it has {len(tokens)} tokens instead of {starts[-1]}"
  except (OSError, ValueError) as error:
    damage = str(error)
  if damage:
    raise UserError(f"the {name} stream in {folder} is damaged ({damage}); delete that folder and run again")
  return TokenStream(tokens, starts, padding)


def tokens_key(*tokens: np.ndarray) -> int:
  """A hash below 2**64 of the tokens of a document, which are given in parts. Equal documents have equal hashes."""
  digest = hashlib.blake2b(digest_size=8)
  for part in tokens:
    digest.update(part.astype("<i4").tobytes())
  return int.from_bytes(digest.digest(), "little")


def token_dtype(vocab_size: int) -> str:
  """Dtype of ids on disk. It is little-endian, so that a cache can be moved between machines."""
  return "<u2" if vocab_size <= 2**16 else "<u4"
