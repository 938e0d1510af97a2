"""Tokenizers convert text to token ids and back."""

import hashlib
import pathlib
import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from moejax.config.data import BYTES, SEQIO, unknown_tokenizer
from moejax.data.json_tokenizer import JsonTokenizer
from moejax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moejax.data.seqio_vocabulary import SeqioTokenizer
from moejax.data.tiktoken_tokenizer import TiktokenTokenizer
from moejax.errors import UserError


class Tokenizer(Protocol):
  """The interface of tokenizers. V is vocab_size."""

  @property
  def vocab_size(self) -> int:
    """The number of ids, including special tokens (V)."""

  @property
  def padding(self) -> int:
    """Id of padding at the end of a short sequence."""

  @property
  def begin(self) -> int:
    """Id that begins every document and does not occur in text."""

  @property
  def end(self) -> int:
    """Id of an end-of-text token. Token streams do not contain it, since the next BEGIN ends a document."""

  @property
  def identity(self) -> str:
    """A string that identifies the tokenizer. It is part of the cache key of a corpus."""

  @property
  def byte_lengths(self) -> np.ndarray:
    """int32 [V]: number of UTF-8 bytes of text of each id, 0 for special tokens.

    It is used to compute bits per byte, and is exact if encoding is lossless. If a tokenizer normalizes text or adds a
    space before it, the bytes of the resulting tokens are counted.
    """

  def encode(self, text: str) -> np.ndarray:
    """int32 [n]: the ids of `text`, without special tokens, even if the text spells one out."""

  def decode(self, ids: np.ndarray) -> str:
    """The text of `ids` [n]. Special tokens are left out, and invalid UTF-8 becomes U+FFFD."""


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


_PIECE = 2**20
"""Number of characters that are encoded at once, because libraries need up to 70 bytes of memory per byte of text."""
_CONTEXTS = (512, 499)
"""Numbers of characters on each side of a cut that are used to check that the cut does not change the tokens. There are
two numbers because a cut in a long run of one character may be valid for one start of the run but not for another."""
_TRIES = 64


def encoded(tokenizer: Tokenizer, text: str) -> Iterator[np.ndarray]:
  """Encodes a text in parts int32 [n1], [n2], ..., whose concatenation equals the encoding of the whole text.

  A long text is cut at positions where this does not change the ids: before a space, or at a space that is omitted, for
  tokenizers that add a space before every text. If there is no such position, the text is encoded as a whole.
  """
  start = 0
  while len(text) - start > _PIECE:
    cut = _cut(tokenizer, text, start + _PIECE)
    if cut is None:
      break
    stop, following = cut
    yield tokenizer.encode(text[start:stop])
    start = following
  yield tokenizer.encode(text[start:])


def _cut(tokenizer: Tokenizer, text: str, full: int) -> tuple[int, int] | None:
  """Returns where a piece can end and where the next can start, before `full`, or None."""
  half = full - _PIECE // 2
  spaces = (half + match.start() for match in re.finditer(r"(?<=\S)\s", text[half:full]))
  for at in [*reversed(deque(spaces, _TRIES)), *range(full - 1, full - _TRIES, -1)]:
    for following in (at, at + 1):
      if all(_is_seam(tokenizer, text[at - n : at], text[at:following], text[following : at + n]) for n in _CONTEXTS):
        return at, following
  return None


def _is_seam(tokenizer: Tokenizer, left: str, skipped: str, right: str) -> bool:
  apart = np.r_[tokenizer.encode(left), tokenizer.encode(right)]
  return np.array_equal(tokenizer.encode(left + skipped + right), apart)


VOCAB_MULTIPLE = 128
"""Vocabulary sizes are padded to a multiple of this, the tile of the matrix units of TPUs and GPUs."""


def padded_vocab_size(needed: int, shards: int = 1) -> int:
  """The smallest model.vocab_size of at least `needed` that has complete tiles on each of `shards` shards.

  Ids beyond the vocabulary of the tokenizer are never targets.
  """
  return -(-needed // (VOCAB_MULTIPLE * shards)) * VOCAB_MULTIPLE * shards


def make_tokenizer(name: str) -> Tokenizer:
  """Makes a tokenizer, given a name as in data.tokenizer.

  Raises:
    UserError: If there is no such tokenizer, its file is missing or damaged, or its library is not installed.
  """
  if name == BYTES:
    return ByteTokenizer()
  if name.startswith(SEQIO):
    return SeqioTokenizer(name)
  path = pathlib.Path(name).expanduser()
  if path.suffix not in _OF_SUFFIX:
    raise UserError(unknown_tokenizer(name))
  try:
    content = path.read_bytes()
  except OSError as error:
    raise UserError(
      f"data.tokenizer={name!r} cannot be read ({error.strerror}); give a tokenizer file, for example from "
      "`hf download MODEL tokenizer.json` or `moejax tokenizer train`"
    ) from None
  try:
    return _OF_SUFFIX[path.suffix](path, hashlib.sha256(content).hexdigest())
  except (ValueError, KeyError, RuntimeError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f"data.tokenizer={name!r} is not a {path.suffix} tokenizer ({error}); use another file") from None


_OF_SUFFIX: dict[str, Callable[[pathlib.Path, str], Tokenizer]] = {
  ".model": SentencePieceTokenizer,
  ".json": JsonTokenizer,
  ".tiktoken": TiktokenTokenizer,
}
