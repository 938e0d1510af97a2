"""From an experiment to what the loop runs: spec, compiled step, input."""

import dataclasses
import time
from collections.abc import Callable

from moejax.config.experiment import Experiment
from moejax.data.corpus import Corpus
from moejax.data.mixture import training_mixture
from moejax.data.pipeline import train_batches
from moejax.data.tokenizers import VOCAB_MULTIPLE, make_tokenizer, padded_vocab_size
from moejax.errors import UserError
from moejax.partitioning import Partitioner, make_partitioner
from moejax.training.compiler import compiler_options
from moejax.training.loop import Batches, rows_of_process
from moejax.training.memory import Memory, argument_bytes, check_fits, program_memory
from moejax.training.state import TrainSpec, make_train_spec
from moejax.training.step import TrainStep, abstract_inputs, make_train_step


@dataclasses.dataclass(frozen=True)
class Prepared:
  """An experiment that is ready to run."""

  spec: TrainSpec
  step: TrainStep
  """Compiled for exactly the experiment's batch."""
  batches: Callable[[], Batches]
  """Opens this process's part of the input at its first batch."""
  memory: Memory
  """Of the step, on each device."""
  compile_time_s: float
  """Seconds to trace and compile the step."""


def prepare(experiment: Experiment, corpus: Corpus) -> Prepared:
  """Places and compiles an experiment on the devices present.

  Raises:
    UserError: as `on_devices`, or the step does not fit the devices' memory.
  """
  experiment, partitioner = on_devices(experiment)
  spec = make_train_spec(experiment, partitioner)
  inputs, what = abstract_inputs(spec), f"the train step of {experiment.name}"
  remedy = _less_memory(experiment)
  # If the state alone does not fit, there is no need to compile.
  check_fits(what, Memory(argument_bytes(inputs[0]), 0), partitioner, remedy)
  begin = time.perf_counter()
  lowered = make_train_step(spec).lower(*inputs)
  step = lowered.compile(compiler_options=compiler_options(partitioner.device))
  compile_time_s = time.perf_counter() - begin
  memory = program_memory(step)
  check_fits(what, memory, partitioner, remedy)
  index, count = rows_of_process(spec)

  def batches() -> Batches:
    mixture = training_mixture(corpus, experiment.data)
    return train_batches(mixture, experiment.data, experiment.training.batch_size, index, count)

  return Prepared(spec, step, batches, memory, compile_time_s)


def _less_memory(experiment: Experiment) -> str:
  """What makes a train step smaller."""
  training, remat = experiment.training, experiment.model.remat
  smallest = remat == "layer_inputs"
  return (
    f"lower training.batch_size={training.batch_size}, "
    f"raise training.gradient_accumulation={training.gradient_accumulation}, "
    + ("" if smallest else f"set model.remat={remat} to layer_inputs, ")
    + "or use more devices (mesh)"
  )


def on_devices(experiment: Experiment) -> tuple[Experiment, Partitioner]:
  """The experiment with its mesh filled in for the devices present, and the mesh itself; reads and compiles nothing.

  Raises:
    UserError: the mesh does not fit the devices or the tensors, or the vocabulary is smaller than the tokenizer's.
  """
  partitioner = make_partitioner(experiment.mesh, experiment.rules)
  needed, there = make_tokenizer(experiment.data.tokenizer).vocab_size, experiment.model.vocab_size
  if there < needed:
    padded = padded_vocab_size(needed, partitioner.shards("vocab"))
    raise UserError(
      f"model.vocab_size={there} is less than the {needed} tokens of data.tokenizer={experiment.data.tokenizer!r}; "
      f"use at least {needed}, best {padded}: a multiple of {VOCAB_MULTIPLE} that the mesh divides"
    )
  # Constructing it again checks batch and tensors against the data axis that only the devices decide.
  return dataclasses.replace(experiment, mesh=partitioner.shape), partitioner
