"""A SentencePiece model as a tokenizer."""

import functools
import pathlib
from typing import Any

import numpy as np

from moejax.optional import library

SPACE = "\u2581"
"""How pieces write a space."""


class SentencePieceTokenizer:
  """Ids of the model; a model without a beginning or an end of text gets ids behind its own."""

  def __init__(self, path: pathlib.Path, sha256: str):
    self._model = library("sentencepiece").SentencePieceProcessor(model_file=str(path))
    self.identity = f"sentencepiece: {sha256}"
    size = self._model.vocab_size()
    begin, end = self._model.bos_id(), self._model.eos_id()
    self.begin = begin if begin >= 0 else size
    self.end = end if end >= 0 else size + (begin < 0)
    self.vocab_size = size + (begin < 0) + (end < 0)
    padding = self._model.pad_id()
    self.padding = padding if padding >= 0 else self.end

  @functools.cached_property
  def byte_lengths(self) -> np.ndarray:
    lengths = np.zeros(self.vocab_size, np.int32)
    own = piece_lengths(self._model)
    lengths[: len(own)] = own
    return lengths

  def encode(self, text: str) -> np.ndarray:
    return np.array(self._model.encode(text), np.int32)

  def decode(self, ids: np.ndarray) -> str:
    text = self.byte_lengths > 0
    return self._model.decode([i for i in np.asarray(ids).tolist() if 0 <= i < len(text) and text[i]])


def piece_lengths(model: Any) -> np.ndarray:
  """int32 [V]: UTF-8 bytes of text that each piece of a SentencePieceProcessor stands for."""
  lengths = np.zeros(model.vocab_size(), np.int32)
  for i in range(len(lengths)):
    if model.is_byte(i) or model.is_unknown(i):
      lengths[i] = 1  # an unknown character has at least one byte; no more is known
    elif not (model.is_control(i) or model.is_unused(i)):
      lengths[i] = len(model.id_to_piece(i).replace(SPACE, " ").encode())
  return lengths
