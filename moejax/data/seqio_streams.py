"""Tasks and Mixtures of seqio, materialised once as token shards: seqio preprocesses, grain shuffles and mixes."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from moejax.data.appearing import appearing
from moejax.data.seqio_lookup import find
from moejax.data.seqio_vocabulary import vocabulary_identity
from moejax.data.shards import Block, ShardWriter
from moejax.data.tokenizers import Tokenizer
from moejax.errors import UserError

_BLOCK_EXAMPLES = 1024


@dataclasses.dataclass(frozen=True)
class Materialised:
  """One Task of an entry, as a packed folder."""

  folder: pathlib.Path
  rate: float
  """Its part of the Mixture; 1 of a Task that was named itself."""


def materialise(name: str, cache: pathlib.Path, tokenizer: Tokenizer) -> list[Materialised]:
  """The Tasks behind `seqio:MODULE/NAME@SPLIT` in `cache`, each written there where it is missing.

  A document is BEGIN and an example's targets, or its inputs and then its targets, of which only the targets are
  predicted. Preprocessors run without a sequence length, in the order of the source, and with seed 0 where they draw
  random numbers. A Task whose code has changed is not noticed: delete its folder.

  Raises:
    UserError: as find, or the vocabulary is not the tokenizer's.
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
          f"the {feature} of seqio task {task.name!r} have the vocabulary {identity!r} and data.tokenizer is "
          f"{tokenizer.identity!r}; set data.tokenizer to {name.partition('@')[0]!r}"
        )
    request = {"task": task.name, "split": split, "examples": task.num_input_examples(split)}
    request |= {"tokenizer": tokenizer.identity}
    folder = cache / f"seqio-{hashlib.sha256(json.dumps(request).encode()).hexdigest()[:20]}"
    if not folder.is_dir():
      with appearing(folder) as part:
        writer = ShardWriter(part, request, tokenizer.vocab_size)
        for block in _blocks(task, split, tokenizer.begin):
          writer.add(block)
        writer.finish({"vocab_size": tokenizer.vocab_size, "text_bytes": None})
    result.append(Materialised(folder, rates[task.name]))
  return result


def _features(task: Any) -> list[str]:
  """The features that documents are made of, in order."""
  return [feature for feature in ("inputs", "targets") if feature in task.output_features]


def _blocks(task: Any, split: str, begin: int) -> Iterator[Block]:
  features = _features(task)
  documents: list[list[np.ndarray]] = []
  examples = task.get_dataset(sequence_length=None, split=split, shuffle=False, seed=0, num_epochs=1)
  for example in examples.as_numpy_iterator():
    documents.append([np.array([begin]), *(np.asarray(example[feature]) for feature in features)])
    if len(documents) == _BLOCK_EXAMPLES:
      yield _block(documents)
      documents = []
  if documents:
    yield _block(documents)


def _block(documents: list[list[np.ndarray]]) -> Block:
  lengths = np.array([sum(map(len, parts)) for parts in documents], np.int64)
  has_inputs = len(documents[0]) == 3
  prefixes = np.array([len(parts[1]) for parts in documents], np.int64) if has_inputs else None
  return Block(np.concatenate([part for parts in documents for part in parts]), lengths, prefixes, None)
