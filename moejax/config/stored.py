"""Reads an experiment or a suite from the JSON file that a run or a comparison wrote."""

import dataclasses
import pathlib
from typing import Any

from moejax.config.data import SEQIO, seqio_module
from moejax.config.dispatch import Dispatch
from moejax.config.experiment import Experiment, Suite
from moejax.config.kinds import KIND, kinds
from moejax.config.plain import from_plain, parse_json
from moejax.config.router import Router
from moejax.errors import UserError

EARLIER = "earlier_schedules"
"""Key of experiment.json with the earlier training lengths of a run that was extended."""

NAMED_BY_FILES: dict[str, str] = {}
"""Modules of seqio tasks that are named in configuration files, with the file. They are not imported automatically,
because the file may come from somebody else."""


def read_configuration(path: pathlib.Path) -> Experiment | Suite:
  """Reads an experiment.json or a suite.json. training.steps of an experiment is the number of steps of the run.

  Raises:
    UserError: If the file cannot be read or is not a configuration.
  """
  plain = _read(path)
  if "pairs" in plain:
    return _suite(plain, path)
  length, experiment = plain.get("steps"), _experiment(plain, path)
  if not isinstance(length, int):
    return experiment
  return dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, steps=length))


def read_experiment_file(path: pathlib.Path) -> Experiment:
  """Reads an experiment.json. mesh.data is None, so that all available devices are used.

  Raises:
    UserError: If the file cannot be read or is not an experiment.
  """
  return _experiment(_read(path), path)


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    plain = parse_json(path.read_bytes())
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}; give the experiment.json of a run") from error
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}); give the experiment.json of a run") from error
  if not isinstance(plain, dict):
    raise UserError(
      f"{path} is not an experiment: it contains a {type(plain).__name__}; give the experiment.json of a run"
    )
  try:
    return current(plain)
  except (AttributeError, KeyError, TypeError) as error:
    raise UserError(f"{path} is not an experiment; give the experiment.json of a run") from error


def current(plain: Any) -> Any:
  """Converts plain data of earlier versions, which had the fields of all routers and dispatches, and `free` for
  `matchable`."""
  if isinstance(plain, list):
    return [current(item) for item in plain]
  if not isinstance(plain, dict):
    return plain
  if "free" in plain and "model" in plain:
    plain = {"matchable" if name == "free" else name: value for name, value in plain.items()}
  plain = {name: _router(value) if name == "router" else current(value) for name, value in plain.items()}
  if isinstance(plain.get("dispatch"), str):
    own = {name: plain.pop(name) for name in ("priority", "exchange", "receive_factor") if name in plain}
    fields = [field.name for field in dataclasses.fields(kinds(Dispatch)[plain["dispatch"]])]
    plain["dispatch"] = {KIND: plain["dispatch"], **{name: own[name] for name in fields if name in own}}
  return plain


OF_OTHER_ROUTERS = {
  "scores": ("softmax",), "renormalize": (True, False), "threshold": (None,), "bias_rate": (0.0,),
  "expert_groups": (1,), "groups_per_token": (1,), "gumbel": (0.0,),
}  # fmt: skip
"""Values, in earlier versions, of fields that a router did not use."""


def _router(plain: Any) -> Any:
  kind = kinds(Router).get(plain.get(KIND, "")) if isinstance(plain, dict) else None
  if kind is None:
    return plain
  own = [field.name for field in dataclasses.fields(kind)]
  return {name: value for name, value in plain.items() if name in own or value not in OF_OTHER_ROUTERS.get(name, ())}


def _experiment(plain: dict[str, Any], path: pathlib.Path) -> Experiment:
  plain = {name: value for name, value in plain.items() if name not in ("steps", EARLIER)}
  try:
    experiment = from_plain(Experiment, plain)
  except ValueError as error:
    raise UserError(f"{path} is not an experiment: {error}") from error
  _note_modules(experiment, path)
  return dataclasses.replace(experiment, mesh=dataclasses.replace(experiment.mesh, data=None))


def _suite(plain: dict[str, Any], path: pathlib.Path) -> Suite:
  try:
    suite = from_plain(Suite, plain)
  except ValueError as error:
    raise UserError(f"{path} is not a suite: {error}") from error
  for member in suite.members:
    _note_modules(member, path)
  return suite


def _note_modules(experiment: Experiment, path: pathlib.Path) -> None:
  data = experiment.data
  for name in (*data.train, *data.validation, data.tokenizer):
    if name.startswith(SEQIO) and "/" in name:
      NAMED_BY_FILES[seqio_module(name)] = str(path)
