"""Saves the checkpoint of step 0 of a run whose initial parameters are imported."""

import pathlib

import jax
import jax.numpy as jnp

from moejax.errors import UserError
from moejax.models.abstract import AbstractModel, Parameters
from moejax.training.checkpoint import Checkpointer
from moejax.training.memory import Memory, argument_bytes, check_fits
from moejax.training.prepare import Placed
from moejax.training.run_directory import RUN, claim, prepare_directory
from moejax.training.state import State, TrainSpec, make_train_spec


def check_new_run(directory: pathlib.Path) -> None:
  """Creates a directory for a run.

  Raises:
    UserError: If it contains a run or a model in Hugging Face format, or is not writable.
  """
  for name in (RUN, "checkpoints"):
    if (directory / name).exists():
      raise UserError(f"{directory} holds a run; choose another directory, or delete {directory / name}")
  if (directory / "config.json").exists() or any(directory.glob("*.safetensors")):
    raise UserError(f"{directory} holds a model in Hugging Face format; choose another directory for the run")
  prepare_directory(directory, "RUN")


def spec_of_new_run(placed: Placed, directory: pathlib.Path) -> TrainSpec:
  """Makes the spec of a run whose first checkpoint is saved.

  Raises:
    UserError: If its state does not fit in memory.
  """
  spec = make_train_spec(placed.experiment, placed.partitioner)
  needed = Memory(argument_bytes(spec.abstract_state), 0)
  check_fits(f"the new run {directory}", needed, spec.partitioner, "use a smaller model or more devices (mesh)")
  return spec


def stacked_as(model: AbstractModel, parameters: Parameters) -> Parameters:
  """Parameters of unrolled layers in the form and on the devices of a model, whose layers may be scanned."""
  if model.config.layers == "scanned":
    periods = [parameters["layers"][period] for period in range(model.config.num_periods)]
    parameters = {**parameters, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *periods)}
  return jax.device_put(parameters, model.shardings)


def save_first(spec: TrainSpec, parameters: Parameters, directory: pathlib.Path) -> None:
  """Saves parameters and a new optimizer state as step 0 of a run, and its experiment."""
  save_start(spec, parameters, directory)
  claim(directory, spec.experiment, spec.experiment.training.steps or 0)


def save_start(spec: TrainSpec, parameters: Parameters, directory: pathlib.Path, batch: int = 0) -> None:
  """Saves parameters and a new optimizer state as step 0 of a run. `batch` is the index of its first batch."""
  moments = jax.jit(spec.optimizer.init, out_shardings=spec.shardings.optimizer)(parameters)
  step = jax.device_put(jnp.zeros((), jnp.int32), spec.partitioner.replicated)
  checkpointer = Checkpointer(directory / "checkpoints", spec.experiment.training.checkpoints)
  progress = {"data": None, "train_time_s": 0.0, "tokens": 0, "batch": batch}
  checkpointer.save(State(step, parameters, moments), 0, progress)
  checkpointer.close()
