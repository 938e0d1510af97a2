"""Provides the text of an experiment as a seqio Task, for programs that read seqio."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from moejax.config.data import Data
from moejax.data.corpus import SPLITS, split_documents
from moejax.data.tokenizers import Tokenizer, make_tokenizer
from moejax.optional import library


def register_task(name: str, data: Data) -> Any:
  """Registers and returns a seqio Task with the text of `data`.

  Its splits train and validation have the same documents as the experiment, and its feature `targets` has the same
  tokens without BEGIN.
  """
  seqio, tensorflow = library("seqio"), library("tensorflow")
  vocabulary = _vocabulary(make_tokenizer(data.tokenizer))

  def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
    def texts() -> Iterator[dict[str, str]]:
      for where, text in split_documents(data):
        if where == split:
          yield {"targets": text}

    signature = {"targets": tensorflow.TensorSpec((), tensorflow.string)}
    return tensorflow.data.Dataset.from_generator(texts, output_signature=signature)

  return seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(dataset, splits=SPLITS),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features={"targets": seqio.Feature(vocabulary, add_eos=False)},
  )


def _vocabulary(tokenizer: Tokenizer) -> Any:
  """Makes a seqio Vocabulary from a tokenizer."""
  tensorflow = library("tensorflow")
  base: Any = library("seqio").Vocabulary

  def encode(utf8: Any) -> np.ndarray:
    """Encodes bytes, which graphs pass, or an array of bytes, which eager calls pass."""
    return tokenizer.encode((utf8 if isinstance(utf8, bytes) else utf8.item()).decode())

  class TokenizerVocabulary(base):
    """A vocabulary that calls the tokenizer, also in graphs."""

    @property
    def eos_id(self) -> int:
      return tokenizer.end

    @property
    def bos_id(self) -> int:
      return tokenizer.begin

    @property
    def unk_id(self) -> None:
      return None

    @property
    def _base_vocab_size(self) -> int:
      return tokenizer.vocab_size

    def _encode(self, s: str) -> list[int]:
      return tokenizer.encode(s).tolist()

    def _decode(self, ids: Any) -> str:
      return tokenizer.decode(np.asarray(ids))

    def _encode_tf(self, s: Any) -> Any:
      ids = tensorflow.numpy_function(encode, [tensorflow.convert_to_tensor(s)], tensorflow.int32)
      ids.set_shape([None])
      return ids

    def _decode_tf(self, ids: Any) -> Any:
      text = tensorflow.numpy_function(lambda values: tokenizer.decode(values).encode(), [ids], tensorflow.string)
      text.set_shape([])
      return text

    def __str__(self) -> str:
      return f"TokenizerVocabulary({tokenizer.identity})"

    def __eq__(self, other: object) -> bool:
      return str(self) == str(other)

    def __hash__(self) -> int:
      return hash(str(self))

  return TokenizerVocabulary()
