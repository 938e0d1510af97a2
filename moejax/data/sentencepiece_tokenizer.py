"""Tokenizers in SentencePiece model files."""

import functools
import pathlib
from typing import Any

import numpy as np

from moejax.optional import library

SPACE = "\u2581"
"""The character that represents a space in pieces."""


class SentencePieceTokenizer:
  """The tokenizer of a model. If the model has no begin or end token, they are added after its ids.

  If the model has no piece for a space, it would encode a space as the three bytes of SPACE. In this case, a token of
  one byte is added for the space.
  """

  def __init__(self, path: pathlib.Path, sha256: str):
    self._model = library("sentencepiece").SentencePieceProcessor(model_file=str(path))
    self.identity = f"sentencepiece: {sha256}"
    size = self._model.vocab_size()
    begin, end = self._model.bos_id(), self._model.eos_id()
    self.begin = begin if begin >= 0 else size
    self.end = end if end >= 0 else size + (begin < 0)
    self.vocab_size = size + (begin < 0) + (end < 0)
    self._bytes_of_space = _bytes_of_space(self._model)
    if self._bytes_of_space is not None:
      self._space = self.vocab_size
      self.vocab_size += 1
      self.identity += " with a space"
    padding = self._model.pad_id()
    self.padding = padding if padding >= 0 else self.end

  @functools.cached_property
  def byte_lengths(self) -> np.ndarray:
    lengths = np.zeros(self.vocab_size, np.int32)
    own = piece_lengths(self._model)
    lengths[: len(own)] = own
    if self._bytes_of_space is not None:
      lengths[self._space] = 1
    return lengths

  def encode(self, text: str) -> np.ndarray:
    ids = np.array(self._model.encode(text), np.int32)
    if self._bytes_of_space is None or len(ids) < 3:
      return ids
    first, second, third = self._bytes_of_space
    at = np.flatnonzero((ids[:-2] == first) & (ids[1:-1] == second) & (ids[2:] == third))
    ids[at] = self._space
    return np.delete(ids, np.concatenate([at + 1, at + 2]))

  def decode(self, ids: np.ndarray) -> str:
    text = self.byte_lengths > 0
    kept = [i for i in np.asarray(ids).tolist() if 0 <= i < len(text) and text[i]]
    if self._bytes_of_space is None:
      return self._model.decode(kept)
    kept = [part for i in kept for part in (self._bytes_of_space if i == self._space else (i,))]
    return self._model.decode(kept).replace(SPACE, " ")  # the library does not replace it in text from byte tokens


def _bytes_of_space(model: Any) -> tuple[int, ...] | None:
  """The three byte ids with which a model encodes a space, or None if it has a piece for the space."""
  ids = tuple(model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode())
  has_piece = model.piece_to_id(SPACE) != model.unk_id()
  return ids if not has_piece and all(model.is_byte(i) for i in ids) else None


def piece_lengths(model: Any) -> np.ndarray:
  """int32 [V]: number of UTF-8 bytes of text of each piece of a SentencePieceProcessor."""
  lengths = np.zeros(model.vocab_size(), np.int32)
  for i in range(len(lengths)):
    if model.is_byte(i) or model.is_unknown(i):
      lengths[i] = 1  # an unknown character has at least one byte
    elif not (model.is_control(i) or model.is_unused(i)):
      lengths[i] = len(model.id_to_piece(i).replace(SPACE, " ").encode())
  return lengths
