"""Writes seqio Tasks and Mixtures to token shards. seqio preprocesses the examples; grain shuffles and mixes them."""

import dataclasses
import functools
import hashlib
import inspect
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from moejax.data.appearing import appearing
from moejax.data.seqio_lookup import find
from moejax.data.seqio_vocabulary import vocabulary_identity
from moejax.data.shards import FORMAT, ShardWriter, TokenBlock
from moejax.data.tokenizers import Tokenizer
from moejax.errors import UserError, reason

_BLOCK_EXAMPLES = 1024


@dataclasses.dataclass(frozen=True)
class Materialised:
  """A Task as a packed folder."""

  folder: pathlib.Path
  rate: float
  """Its fraction of the Mixture, or 1 for a single Task."""


def materialise(name: str, cache: pathlib.Path, tokenizer: Tokenizer, sequence_length: int) -> list[Materialised]:
  """The Tasks of `seqio:MODULE/NAME@SPLIT` as packed folders in `cache`, which are written if they are missing.

  A document is BEGIN and the targets of an example, or BEGIN, its inputs and its targets, of which only the targets are
  predicted. Examples have the order of the source, and random preprocessors use seed 0. If a preprocessor uses seqio's
  `sequence_length`, as span corruption does, the length of each feature is `sequence_length`, and longer features are
  truncated, as in seqio. Otherwise, nothing is truncated. Changes of the code of a Task are not detected; delete its
  folder to preprocess it again.

  Raises:
    UserError: If the Task is not found (see `find`), or its vocabulary differs from that of the tokenizer.
  """
  found, split = find(name)
  tasks = found.tasks if hasattr(found, "tasks") else [found]  # a Mixture has them
  rates = {task.name: found.get_rate(task) if hasattr(found, "tasks") else 1.0 for task in tasks}
  result = []
  for task in tasks:
    for feature in _features(task):
      identity = vocabulary_identity(task.output_features[feature].vocabulary)
      if identity != tokenizer.identity:
        raise UserError(
          f"the {feature} of seqio task {task.name!r} have the vocabulary {identity!r}, but data.tokenizer is "
          f"{tokenizer.identity!r}; set data.tokenizer to {name.partition('@')[0]!r}"
        )
    lengths = dict.fromkeys(_features(task), sequence_length) if _reads_sequence_length(task) else None
    request = {"format": FORMAT, "task": task.name, "split": split, "examples": task.num_input_examples(split)}
    request |= {"tokenizer": tokenizer.identity, "sequence_length": lengths}
    folder = cache / f"seqio-{hashlib.sha256(json.dumps(request).encode()).hexdigest()[:20]}"
    if not folder.is_dir():
      with appearing(folder) as part:
        writer = ShardWriter(part, request, tokenizer.vocab_size)
        for block in _blocks(task, split, tokenizer.begin, lengths):
          writer.add(block)
        writer.finish({"vocab_size": tokenizer.vocab_size, "text_bytes": None})
    result.append(Materialised(folder, rates[task.name]))
  return result


def _features(task: Any) -> list[str]:
  """The features of which documents consist, in order."""
  return [feature for feature in ("inputs", "targets") if feature in task.output_features]


def _reads_sequence_length(task: Any) -> bool:
  """Whether a preprocessor has an argument sequence_length that the Task does not set."""

  def free(preprocessor: Any) -> set[str]:
    if dataclasses.is_dataclass(preprocessor):
      return {field.name for field in dataclasses.fields(preprocessor)}
    bound = preprocessor.keywords if isinstance(preprocessor, functools.partial) else {}
    return set(inspect.signature(preprocessor).parameters) - set(bound)

  return any("sequence_length" in free(preprocessor) for preprocessor in task.preprocessors)


def _blocks(task: Any, split: str, begin: int, lengths: dict[str, int] | None) -> Iterator[TokenBlock]:
  features = _features(task)
  documents: list[list[np.ndarray]] = []
  for example in _examples(task, split, lengths):
    documents.append([np.array([begin]), *(np.asarray(example[feature]) for feature in features)])
    if len(documents) == _BLOCK_EXAMPLES:
      yield _block(documents)
      documents = []
  if documents:
    yield _block(documents)


def _examples(task: Any, split: str, lengths: dict[str, int] | None) -> Iterator[Any]:
  try:
    examples = task.get_dataset(sequence_length=lengths, split=split, shuffle=False, seed=0, num_epochs=1)
    yield from examples.as_numpy_iterator()
  except Exception as error:  # any exception of the source or of a preprocessor of the task
    raise UserError(
      f"seqio task {task.name!r}, split {split!r}, raises {type(error).__name__}: {reason(error)}"
    ) from error


def _block(documents: list[list[np.ndarray]]) -> TokenBlock:
  lengths = np.array([sum(map(len, parts)) for parts in documents], np.int64)
  has_inputs = len(documents[0]) == 3
  prefixes = np.array([len(parts[1]) for parts in documents], np.int64) if has_inputs else None
  return TokenBlock(np.concatenate([part for parts in documents for part in parts]), lengths, prefixes, None)
