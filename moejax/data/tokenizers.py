"""Text to token ids and back."""

from typing import Protocol

import numpy as np

from moejax.errors import UserError


class Tokenizer(Protocol):
  """What the data floor needs of a tokenizer. V is vocab_size."""

  @property
  def vocab_size(self) -> int:
    """Ids that exist, specials included (V)."""

  @property
  def padding(self) -> int:
    """Id that fills the end of a short sequence."""

  @property
  def begin(self) -> int:
    """Id that opens every document."""

  @property
  def end(self) -> int:
    """Id that a user's text may be closed with; streams do not hold it, the next BEGIN ends a document."""

  @property
  def identity(self) -> str:
    """Differs between any two tokenizers that could encode a text differently; part of the corpus cache's key."""

  @property
  def byte_lengths(self) -> np.ndarray:
    """int32 [V]: UTF-8 bytes of text that each id stands for, 0 for specials."""

  def encode(self, text: str) -> np.ndarray:
    """int32 [n]: the ids of `text`, without specials."""

  def decode(self, ids: np.ndarray) -> str:
    """The text of `ids` [n]; specials are left out, bytes that are no UTF-8 become U+FFFD."""


class ByteTokenizer:
  """The 256 bytes as ids 0 to 255, then padding, begin and end."""

  padding = 256
  begin = 257
  end = 258
  vocab_size = 259
  identity = "bytes: 256 padding begin end"

  @property
  def byte_lengths(self) -> np.ndarray:
    lengths = np.zeros(self.vocab_size, np.int32)
    lengths[:256] = 1
    return lengths

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, ids: np.ndarray) -> str:
    ids = np.asarray(ids)
    return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode(errors="replace")


def make_tokenizer(name: str) -> Tokenizer:
  """The tokenizer that data.tokenizer names.

  Raises:
    UserError: no tokenizer has this name.
  """
  match name:
    case "bytes":
      return ByteTokenizer()
    case _:
      raise UserError(f"data.tokenizer={name!r} is not one of bytes")
