"""Makes experiments from configurations of other projects, for plans: `hf:PATH`, `maxtext:PATH.yml,NAME=VALUE,...`."""

import pathlib

from moejax.config.data import Data
from moejax.config.experiment import Evaluation, Experiment
from moejax.config.model import Model
from moejax.config.optimizer import AdamW
from moejax.config.sharding import Mesh
from moejax.config.training import Training
from moejax.errors import UserError
from moejax.interop.hf_plans import planned_model
from moejax.interop.maxtext import read_maxtext

HUGGING_FACE, MAXTEXT = "hf:", "maxtext:"

SEQUENCE_LENGTH = 4096
"""Of a plan of a config.json, which says nothing of training."""


def is_foreign(name: str) -> bool:
  """Whether a name is that of another project's configuration."""
  return name.startswith((HUGGING_FACE, MAXTEXT))


def foreign_experiment(name: str, devices: int, without: tuple[str, ...]) -> tuple[Experiment, dict[str, str]]:
  """Makes an experiment from a configuration of another project. Returns it with the features that are omitted.

  A config.json has neither batch nor mesh: its experiment has one sequence of 4096 tokens on each device and parameters
  sharded over all devices. Options change them.

  Args:
    name: `hf:PATH` of a config.json or its folder, or `maxtext:PATH.yml` with overrides after commas.
    devices: number of devices of the topology.
    without: names of features that may be omitted.

  Raises:
    UserError: If the file cannot be read, or has unsupported features that are not in `without`.
  """
  if name.startswith(HUGGING_FACE):
    path = pathlib.Path(name.removeprefix(HUGGING_FACE))
    model, missing = planned_model(path, SEQUENCE_LENGTH, without)
    stem = path.stem if path.suffix == ".json" and path.stem != "config" else path.resolve().parent.name
    stem = path.resolve().name if path.is_dir() else stem
    return _experiment(stem, model, SEQUENCE_LENGTH, devices, 1, Mesh()), missing
  file, *overrides = name.removeprefix(MAXTEXT).split(",")
  found = read_maxtext(pathlib.Path(file), tuple(overrides))
  refused = {field: what for field, what in found.missing.items() if field not in without}
  unknown = [field for field in without if field not in found.missing]
  if unknown:
    raise UserError(
      f"--without {' '.join(unknown)}: {file} has no such feature; it has {', '.join(found.missing) or 'none'}"
    )
  if refused:
    raise UserError(
      f"{file} has features that moejax does not support: "
      f"{'; '.join(f'{field} ({what})' for field, what in refused.items())}. "
      f"To plan it without them, add --without {' '.join(found.missing)}"
    )
  batch_size, parts = found.batch_size(devices), found.gradient_accumulation
  made = _experiment(pathlib.Path(file).stem, found.model, found.sequence_length, batch_size, parts, found.mesh)
  return made, found.missing


def _experiment(name: str, model: Model, sequence_length: int, batch_size: int, parts: int, mesh: Mesh) -> Experiment:
  return Experiment(
    name=name,
    model=model,
    data=Data(sequence_length=sequence_length),
    training=Training(batch_size=batch_size, gradient_accumulation=parts),
    optimizer=AdamW(learning_rate=3e-4),
    evaluation=Evaluation(batch_size=batch_size // parts),
    mesh=mesh,
  )
