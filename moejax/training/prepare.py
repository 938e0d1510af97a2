"""From an experiment to what the loop runs: definition, compiled step, input."""

import dataclasses
import time
from collections.abc import Callable

from moejax.config.experiment import Experiment
from moejax.data.corpus import Corpus
from moejax.data.pipeline import train_batches
from moejax.errors import UserError
from moejax.partitioning import make_partitioner
from moejax.training.loop import Batches, rows_of_process
from moejax.training.state import Definition, define
from moejax.training.step import TrainStep, abstract_inputs, make_train_step


@dataclasses.dataclass(frozen=True)
class Prepared:
  """An experiment that is ready to run."""

  definition: Definition
  step: TrainStep
  """Compiled for exactly the experiment's batch."""
  batches: Callable[[], Batches]
  """Opens this process's part of the input at its first batch."""
  compile_time_s: float
  """Seconds to trace and compile the step."""


def prepare(experiment: Experiment, corpus: Corpus) -> Prepared:
  """Places and compiles an experiment on the devices present.

  Raises:
    UserError: the mesh does not fit the devices or the tensors, or the vocabulary is smaller than the tokenizer's.
  """
  check_vocabulary(experiment, corpus)
  definition = define(experiment, make_partitioner(experiment.mesh, experiment.rules))
  begin = time.perf_counter()
  step = make_train_step(definition).lower(*abstract_inputs(definition)).compile()
  compile_time_s = time.perf_counter() - begin
  index, count = rows_of_process(definition)

  def batches() -> Batches:
    return train_batches(corpus.train, experiment.data, experiment.training.batch_size, index, count)

  return Prepared(definition, step, batches, compile_time_s)


def check_vocabulary(experiment: Experiment, corpus: Corpus) -> None:
  """Raises UserError where the model has fewer embeddings than the tokenizer has tokens."""
  needed, there = corpus.tokenizer.vocab_size, experiment.model.vocab_size
  if there < needed:
    raise UserError(
      f"model.vocab_size={there} is less than the {needed} tokens of data.tokenizer={experiment.data.tokenizer!r}; "
      f"use at least {needed}"
    )
