"""Loads a trained run onto the available devices."""

import dataclasses
import pathlib
import warnings
from collections.abc import Callable

from moejax.config.experiment import Experiment
from moejax.config.precision import check_device
from moejax.inference.dropless import inference_model
from moejax.inference.sparse import Sparse
from moejax.inference.unrolled import unroll
from moejax.models.abstract import AbstractModel, Parameters
from moejax.partitioning import make_partitioner
from moejax.training.checkpoint import LATEST, restore_parameters
from moejax.training.memory import Memory, argument_bytes, check_fits
from moejax.training.run_directory import check_only_operational, read_experiment


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A trained model."""

  experiment: Experiment
  model: AbstractModel
  parameters: Parameters
  """Parameters in float32, sharded by the rules of the experiment."""
  step: int
  """Number of optimizer steps of the checkpoint."""


def load_run(
  directory: pathlib.Path,
  experiment: Experiment | None = None,
  warn: Callable[[str], None] = warnings.warn,
  sparse: Sparse | None = None,
  checkpoint: str = LATEST,
  decode: bool = False,
) -> Loaded:
  """Loads the parameters of a checkpoint of a run.

  Args:
    directory: directory of the run.
    experiment: the experiment of the run, possibly with another mesh, rules or evaluation. None uses it unchanged.
    warn: called with a warning for each damaged checkpoint.
    sparse: which experts a model uses that was trained with all of them. None uses all.
    checkpoint: "latest", "best" (the lowest held-out bits per byte), or a step.
    decode: whether the model will generate text, for which its layers are unrolled on CPU.

  Raises:
    UserError: If there is no run or no undamaged checkpoint, `experiment` has another model, the mesh does not fit the
      devices, or they lack a type of `model.precision`.
  """
  there = read_experiment(directory)
  experiment = experiment or there
  check_only_operational(there, experiment)
  partitioner = make_partitioner(experiment.mesh, experiment.rules)
  check_device(experiment.model.precision, partitioner.device.device_kind)
  model = inference_model(experiment.model, partitioner, sparse)
  needed = Memory(argument_bytes(model.parameters), 0)
  check_fits(f"the model of {directory}", needed, partitioner, "use more devices (mesh)")
  parameters, step = restore_parameters(directory / "checkpoints", model.parameters, warn, checkpoint)
  if decode and partitioner.platform == "cpu":
    model, parameters = unroll(model, parameters)
  return Loaded(experiment, model, parameters, step)
