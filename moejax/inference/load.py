"""A trained run, read from its directory onto the devices that there are."""

import dataclasses
import pathlib

from moejax.config.experiment import Experiment
from moejax.errors import UserError
from moejax.inference.dropless import inference_model
from moejax.models.abstract import AbstractModel, Parameters
from moejax.partitioning import make_partitioner
from moejax.training.checkpoint import restore_parameters
from moejax.training.run_directory import check_only_operational, read_experiment


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A trained model."""

  experiment: Experiment
  model: AbstractModel
  parameters: Parameters
  """float32, placed by the experiment's rules."""
  step: int
  """Optimizer steps that it was trained for."""


def load_run(directory: pathlib.Path, experiment: Experiment | None = None) -> Loaded:
  """The newest checkpoint of a run.

  Args:
    directory: of the run.
    experiment: the run's, with another mesh, other rules or another evaluation; None takes it as it was.

  Raises:
    UserError: there is no run or no checkpoint, `experiment` is another one, or the mesh does not fit the devices.
  """
  there = read_experiment(directory)
  experiment = experiment or there
  check_only_operational(there, experiment)
  partitioner = make_partitioner(experiment.mesh, experiment.rules)
  model = inference_model(experiment.model, partitioner)
  checkpoints = directory / "checkpoints"
  if not checkpoints.is_dir():
    raise UserError(f"{directory} holds no checkpoint; train the run first")
  parameters, step = restore_parameters(checkpoints, model.parameters)
  return Loaded(experiment, model, parameters, step)
