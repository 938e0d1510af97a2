"""Generated tokens per second of several models, which take turns.

B batch  T query position
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

from moejax.config.experiment import Experiment
from moejax.data.corpus import Corpus
from moejax.data.pipeline import evaluation_batches, num_evaluation_batches
from moejax.errors import UserError
from moejax.inference.generate import Generator
from moejax.models.abstract import AbstractModel, Parameters
from moejax.progress import SILENT, Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
  """How tokens per second are measured: the models take turns, and each has the median of its turns."""

  batch_sizes: tuple[int, ...] = (1, 16)
  prompt_tokens: int = 128
  new_tokens: int = 128
  rounds: int = 5

  def __post_init__(self) -> None:
    for option, value in (("--rounds", self.rounds), *(("--batch-sizes", size) for size in self.batch_sizes)):
      if value < 1:
        raise UserError(f"{option} {value} must be 1 or above")
    if len(set(self.batch_sizes)) < len(self.batch_sizes):
      raise UserError(f"--batch-sizes {' '.join(map(str, self.batch_sizes))} names one twice; name each once")


def decode_speeds(
  members: Mapping[str, tuple[AbstractModel, Parameters]],
  corpus: Corpus,
  experiment: Experiment,
  speed: Speed,
  progress: Progress = SILENT,
) -> dict[str, dict[str, float]]:
  """New tokens per second, prefill included, of each member by batch size. Prompts are held-out text. A batch is padded
  to a multiple of the data shards.

  Args:
    members: models for inference and their parameters, by name.
    corpus: the text.
    experiment: has the sequence length, in which prompt and new tokens must fit, and the evaluation of the text.
    speed: how it is measured. Prompts and continuations are shorter if the sequence length is less than both.
    progress: receives progress reports.
  """
  length = experiment.data.sequence_length
  prompt_tokens = min(speed.prompt_tokens, length // 2)
  new_tokens = min(speed.new_tokens, length - prompt_tokens)
  tokens_BT = next(held_out_batches(corpus, experiment))["tokens"]
  found: dict[str, dict[str, float]] = {name: {} for name in members}
  for size in speed.batch_sizes:
    prompts = [tokens_BT[i % len(tokens_BT), :prompt_tokens].tolist() for i in range(size)]
    generators = {
      name: Generator(model, _padded(size, model), corpus.tokenizer.vocab_size) for name, (model, _) in members.items()
    }
    times: dict[str, list[float]] = {name: [] for name in members}
    progress.stage(f"generate with batch size {size}", total=speed.rounds + 1)
    for turn in range(speed.rounds + 1):
      for name, generator in generators.items():
        begin = time.perf_counter()
        list(generator.generate(members[name][1], prompts, [lambda ids: False] * size, new_tokens))
        if turn:  # the first compiles
          times[name].append(time.perf_counter() - begin)
      progress.advance(turn + 1)
    for name, measured in times.items():
      found[name][str(size)] = size * new_tokens / statistics.median(measured)
  return found


def _padded(size: int, model: AbstractModel) -> int:
  shards = model.partitioner.shards("batch")
  return shards * math.ceil(size / shards)


def held_out_batches(corpus: Corpus, experiment: Experiment) -> Iterator[Any]:
  """Batches of the held-out text of an experiment.

  Raises:
    UserError: If the text is shorter than a sequence.
  """
  evaluation = experiment.evaluation
  arguments = (corpus.validation, experiment.data.sequence_length, evaluation.batch_size, evaluation.max_tokens)
  if not num_evaluation_batches(*arguments):
    raise UserError(f"the held-out text is shorter than data.sequence_length={experiment.data.sequence_length}")
  return evaluation_batches(*arguments)
