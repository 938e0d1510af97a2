"""Prepares runs. A workspace holds what the runs in a directory share, and `prepare` compiles one of them.

Everything is opened and compiled once. Fast checks are made first.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

from moejax import processes
from moejax.config.chips import without_mfu
from moejax.config.experiment import Experiment
from moejax.config.kinds import OfSeveralKinds, is_built_in
from moejax.config.precision import check_device
from moejax.config.sharding import Mesh, Rules
from moejax.config.walk import walk
from moejax.data.corpus import Corpus, build_corpus
from moejax.data.mixture import training_mixture
from moejax.data.pipeline import train_batches
from moejax.data.text import Text
from moejax.data.tokenizers import VOCAB_MULTIPLE, Tokenizer, padded_vocab_size
from moejax.errors import UserError
from moejax.host_memory import check_host_memory, without_effect
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
  """An experiment and its partitioner on the available devices."""

  experiment: Experiment
  """The experiment with a complete mesh."""
  partitioner: Partitioner


@dataclasses.dataclass(frozen=True)
class Workspace:
  """The data that all runs in a directory share."""

  directory: pathlib.Path
  placed: Mapping[str, Placed]
  """The experiments, by name. Experiments with the same mesh and rules share a partitioner."""
  corpus: Corpus


@dataclasses.dataclass(frozen=True)
class Prepared:
  """An experiment that is ready to run."""

  spec: TrainSpec
  step: TrainStep
  """The training step, compiled for the batch shape of the experiment."""
  batches: Callable[[], Batches]
  """Opens the input of this process at the first batch."""
  corpus: Corpus
  memory: Memory
  """Memory of the training step on each device."""
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
  """Locks a directory for the runs of one or several experiments until the end of the block.

  Args:
    experiments: the experiments.
    text: their common text.
    directory: of the run or the comparison, as returned by `open_run` or `open_comparison`.
    what: description of the work, for messages of other processes.
    progress: receives progress reports and notes.
    wait: whether to wait until another process releases the directory, instead of raising UserError.

  Raises:
    UserError: If another process holds the directory, it was started with other text, or the text or the devices are
      not suitable.
  """
  placed = {each.experiment.name: each for each in on_devices(experiments, text.tokenizer)}
  for each in placed.values():
    _try_own_kinds(each)
  with exclusive(directory, what, progress.note, wait):
    for experiment in experiments:
      for caution in experiment.cautions:
        progress.note(f"caution: {experiment.name}: {caution}" if len(experiments) > 1 else f"caution: {caution}")
    device = next(iter(placed.values())).partitioner.device
    if no_mfu := without_mfu(device.platform, device.device_kind):
      progress.note(no_mfu)
    offloading = dict.fromkeys(field for experiment in experiments for field in experiment.offload_fields)
    if no_gain := without_effect(tuple(offloading), device):
      progress.note(f"caution: {no_gain}")
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
  """Builds and compiles the training step of an experiment.

  Raises:
    UserError: If a parameter cannot be sharded, or the step does not fit in device memory.
  """
  progress.stage(f"compile {name}")
  experiment, corpus = workspace.placed[name].experiment, workspace.corpus
  spec = make_train_spec(experiment, workspace.placed[name].partitioner)
  step, memory, compile_time_s = _compile_step(spec)
  return Prepared(spec, step, _batches(spec, corpus), corpus, memory, compile_time_s)


def with_seeds(prepared: Prepared, experiment: Experiment, first_batch: int = 0) -> Prepared:
  """A prepared run of the same program for an experiment that differs only in its name, its seeds and its first batch.

  The noise of routers, if any, is that of the seed of `prepared`, which is part of the program.
  """
  spec = dataclasses.replace(prepared.spec, experiment=experiment)
  return dataclasses.replace(prepared, spec=spec, batches=_batches(spec, prepared.corpus, first_batch))


def _batches(spec: TrainSpec, corpus: Corpus, first_batch: int = 0) -> Callable[[], Batches]:
  """Returns a function that opens the input of this process at the first batch."""
  experiment, local = spec.experiment, rows_of_process(spec)

  def batches() -> Batches:
    mixture = training_mixture(corpus, experiment.data)
    return train_batches(mixture, experiment.data, experiment.training.batch_size, local.rows, first_batch)

  return batches


def on_devices(experiments: Sequence[Experiment], tokenizer: Tokenizer) -> list[Placed]:
  """Completes the meshes of experiments for the available devices. Reads and compiles nothing.

  Raises:
    UserError: If a mesh does not fit the devices or the tensors, a vocabulary is smaller than that of the tokenizer, or
      the devices lack 8-bit products or the memory of the host that it needs.
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
    check_device(experiment.model.precision, partitioner.device.device_kind)
    check_host_memory(experiment.offload_fields, partitioner.device)
    # This constructs the experiment again, which checks batch and tensors against the data axis.
    placed.append(Placed(dataclasses.replace(experiment, mesh=partitioner.shape), partitioner))
  return placed


def _try_own_kinds(placed: Placed) -> None:
  """Traces the train step of an experiment with kinds of a user, whose mistakes then show before text is read."""
  parts = (part for _, part in walk(placed.experiment))
  if any(isinstance(part, OfSeveralKinds) and not is_built_in(type(part)) for part in parts):
    spec = make_train_spec(placed.experiment, placed.partitioner)
    jax.eval_shape(make_train_step(spec), *abstract_inputs(spec))


def _check_vocabulary(experiment: Experiment, tokenizer: Tokenizer, partitioner: Partitioner) -> None:
  needed, there = tokenizer.vocab_size, experiment.model.vocab_size
  if there < needed:
    padded = padded_vocab_size(needed, partitioner.shards("vocab"))
    raise UserError(
      f"model.vocab_size={there} is less than the {needed} tokens of data.tokenizer={experiment.data.tokenizer!r}; "
      f"use at least {needed}, preferably {padded}, a multiple of {VOCAB_MULTIPLE} that is divisible by the mesh"
    )


def _compile_step(spec: TrainSpec) -> tuple[TrainStep, Memory, float]:
  """Returns the training step, its memory on each device, and the seconds to trace and compile it."""
  experiment, partitioner = spec.experiment, spec.partitioner
  inputs, what = abstract_inputs(spec), f"the train step of {experiment.name}"
  remedy = _less_memory(experiment)
  # If the state alone does not fit, there is no need to compile.
  check_fits(what, Memory(argument_bytes(inputs[0]), 0), partitioner, remedy)
  begin = time.perf_counter()
  lowered = make_train_step(spec).lower(*inputs)
  options = compiler_options(partitioner.device, experiment.model, argument_bytes(inputs))
  step = lowered.compile(compiler_options=options)
  compile_time_s = time.perf_counter() - begin
  memory = program_memory(step)
  check_fits(what, memory, partitioner, remedy)
  processes.wait_for_all()
  return step, memory, compile_time_s


def _less_memory(experiment: Experiment) -> str:
  """The remedy if a training step needs too much memory."""
  training, remat = experiment.training, experiment.model.remat
  smallest = remat == "layer_inputs"
  of_selected = " and model.save_activations to ()" if remat == "selected" else ""
  return (
    f"lower training.batch_size={training.batch_size}, "
    f"raise training.gradient_accumulation={training.gradient_accumulation}, "
    + ("" if smallest else f"set model.remat={remat} to layer_inputs{of_selected}, ")
    + "or use more devices (mesh)"
  )
