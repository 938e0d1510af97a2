"""Tokenizers from the vocabulary of a seqio Task or Mixture."""

import functools
import hashlib
from typing import Any

import numpy as np

from moejax.data.sentencepiece_tokenizer import piece_lengths
from moejax.data.seqio_lookup import find
from moejax.optional import library


class SeqioTokenizer:
  """The vocabulary of the targets, and an additional begin token, for which seqio uses padding."""

  def __init__(self, name: str):
    self.vocabulary = find(name)[0].output_features["targets"].vocabulary
    self.identity = vocabulary_identity(self.vocabulary)
    self.begin = self.vocabulary.vocab_size
    self.vocab_size = self.begin + 1
    self.padding = self.vocabulary.pad_id
    self.end = self.padding if self.vocabulary.eos_id is None else self.vocabulary.eos_id

  @functools.cached_property
  def byte_lengths(self) -> np.ndarray:
    seqio, vocabulary = library("seqio"), self.vocabulary
    lengths = np.zeros(self.vocab_size, np.int32)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
      own = piece_lengths(vocabulary.tokenizer)
      lengths[: len(own)] = own
    elif isinstance(vocabulary, seqio.ByteVocabulary):
      lengths[3 : 3 + 256] = 1  # padding, end and unknown, then the bytes
    else:
      lengths[: self.begin] = [len(vocabulary.decode([i]).encode()) for i in range(self.begin)]
    lengths[self.begin - vocabulary.extra_ids : self.begin] = 0  # sentinels of masked spans
    lengths[[self.padding, self.end]] = 0
    return lengths

  def encode(self, text: str) -> np.ndarray:
    return np.array(self.vocabulary.encode(text), np.int32)

  def decode(self, ids: np.ndarray) -> str:
    text = self.byte_lengths > 0
    return self.vocabulary.decode([i for i in np.asarray(ids).tolist() if 0 <= i < len(text) and text[i]])


def vocabulary_identity(vocabulary: Any) -> str:
  """A string that identifies a vocabulary."""
  content = getattr(vocabulary, "sp_model", None) or str(vocabulary).encode()
  kind = type(vocabulary).__name__
  return f"seqio: {kind} {vocabulary.vocab_size} {vocabulary.extra_ids} {hashlib.sha256(content).hexdigest()}"
