"""Prepares runs: a workspace has what runs in one directory share, and `prepare` makes one of them ready to start.

Everything is opened, made and compiled once, and what is quick to check comes before what is slow to make.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from moejax import processes
from moejax.config.chips import without_mfu
from moejax.config.experiment import Experiment
from moejax.config.sharding import Mesh, Rules
from moejax.data.corpus import Corpus, build_corpus
from moejax.data.mixture import training_mixture
from moejax.data.pipeline import train_batches
from moejax.data.text import Text
from moejax.data.tokenizers import VOCAB_MULTIPLE, Tokenizer, padded_vocab_size
from moejax.errors import UserError
from moejax.partitioning import Partitioner, make_partitioner, present_devices
from moejax.progress import SILENT, Progress
from moejax.training.claimed_text import claim_text
from moejax.training.compiler import compiler_options
from moejax.training.exclusive import exclusive
from moejax.training.loop import Batches, rows_of_process
from moejax.training.memory import Memory, argument_bytes, check_fits, program_memory
from moejax.training.state import TrainSpec, make_train_spec
from moejax.training.step import TrainStep, abstract_inputs, make_train_step


@dataclasses.dataclass(frozen=True)
class Placed:
  """An experiment on the devices present."""

  experiment: Experiment
  """With its mesh filled in."""
  partitioner: Partitioner


@dataclasses.dataclass(frozen=True)
class Workspace:
  """What the runs of one directory share."""

  directory: pathlib.Path
  placed: Mapping[str, Placed]
  """The experiments, by name. Those of one mesh and the same rules have the same partitioner."""
  corpus: Corpus


@dataclasses.dataclass(frozen=True)
class Prepared:
  """An experiment that is ready to run."""

  spec: TrainSpec
  step: TrainStep
  """Compiled for exactly the experiment's batch."""
  batches: Callable[[], Batches]
  """Opens this process's part of the input at its first batch."""
  corpus: Corpus
  memory: Memory
  """Of the step, on each device."""
  compile_time_s: float
  """Seconds to trace and compile the step."""


@contextlib.contextmanager
def open_workspace(
  experiments: Sequence[Experiment],
  text: Text,
  directory: pathlib.Path,
  what: str,
  progress: Progress = SILENT,
  wait: bool = False,
) -> Iterator[Workspace]:
  """Holds a directory for runs of some experiments on one text, until the end of the block.

  Args:
    experiments: what will be run.
    text: of all of them.
    directory: of the run or the comparison, as `open_run` or `open_comparison` returns it.
    what: description of the work, for processes that are refused meanwhile.
    progress: receives the progress, and notes for the user.
    wait: whether to wait until another process has released the directory, instead of raising UserError.

  Raises:
    UserError: as `on_devices` and `build_corpus`, the directory was begun with other text, or another process holds it.
  """
  placed = {each.experiment.name: each for each in on_devices(experiments, text.tokenizer)}
  with exclusive(directory, what, progress.note, wait):
    for experiment in experiments:
      for caution in experiment.cautions:
        progress.note(f"caution: {experiment.name}: {caution}" if len(experiments) > 1 else f"caution: {caution}")
    if no_mfu := without_mfu(next(iter(placed.values())).partitioner.device.device_kind):
      progress.note(no_mfu)
    progress.stage("text: reading and tokenizing", total=1.0)
    corpus = processes.first_then_all(
      lambda: build_corpus(
        text,
        directory / "corpus",
        lambda what, part: progress.advance(part, what),
        lambda warning: progress.note(f"warning: {warning}"),
      )
    )
    claim_text(directory, corpus)
    yield Workspace(directory, placed, corpus)


def prepare(workspace: Workspace, name: str, progress: Progress = SILENT) -> Prepared:
  """Defines and compiles an experiment of a workspace.

  Raises:
    UserError: a parameter cannot be placed, or the step does not fit the devices' memory.
  """
  progress.stage(f"compile {name}")
  experiment, corpus = workspace.placed[name].experiment, workspace.corpus
  spec = make_train_spec(experiment, workspace.placed[name].partitioner)
  step, memory, compile_time_s = _compile_step(spec)
  local = rows_of_process(spec)

  def batches() -> Batches:
    mixture = training_mixture(corpus, experiment.data)
    return train_batches(mixture, experiment.data, experiment.training.batch_size, local.rows)

  return Prepared(spec, step, batches, corpus, memory, compile_time_s)


def on_devices(experiments: Sequence[Experiment], tokenizer: Tokenizer) -> list[Placed]:
  """The experiments with their meshes filled in for the devices present; reads and compiles nothing.

  Raises:
    UserError: a mesh does not fit the devices or the tensors, or a vocabulary is smaller than the tokenizer's.
  """
  devices = present_devices()
  meshes: dict[tuple[Mesh, Rules], Partitioner] = {}
  placed = []
  for experiment in experiments:
    key = experiment.mesh.resolve(len(devices)), experiment.rules
    if key not in meshes:
      meshes[key] = make_partitioner(*key, devices)
    partitioner = meshes[key]
    _check_vocabulary(experiment, tokenizer, partitioner)
    # Constructing it again checks batch and tensors against the data axis that only the devices decide.
    placed.append(Placed(dataclasses.replace(experiment, mesh=partitioner.shape), partitioner))
  return placed


def _check_vocabulary(experiment: Experiment, tokenizer: Tokenizer, partitioner: Partitioner) -> None:
  needed, there = tokenizer.vocab_size, experiment.model.vocab_size
  if there < needed:
    padded = padded_vocab_size(needed, partitioner.shards("vocab"))
    raise UserError(
      f"model.vocab_size={there} is less than the {needed} tokens of data.tokenizer={experiment.data.tokenizer!r}; "
      f"use at least {needed}, best {padded}: a multiple of {VOCAB_MULTIPLE} that the mesh divides"
    )


def _compile_step(spec: TrainSpec) -> tuple[TrainStep, Memory, float]:
  """The train step, its memory on each device, and the seconds that it took to trace and compile."""
  experiment, partitioner = spec.experiment, spec.partitioner
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
  return step, memory, compile_time_s


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
