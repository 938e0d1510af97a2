"""A run's directory: which experiment it holds, and its files, written whole or not at all."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

from moejax.config.experiment import Experiment
from moejax.config.plain import from_plain, to_plain
from moejax.errors import UserError

# What may differ when a run continues: it changes how the result is computed or reported, never the result.
OPERATIONAL = ("mesh", "rules", "data.prefetch", "training.checkpoints", "training.log_every", "evaluation")


RUN, COMPARISON = "experiment.json", "suite.json"
"""The configuration that a directory belongs to: one run's or one comparison's."""


def claim(directory: pathlib.Path, experiment: Experiment, steps: int) -> None:
  """Makes `directory` this experiment's, or checks that it is; raises as `claim_json`."""
  claim_json(directory, RUN, run_configuration(experiment, steps))


def run_configuration(experiment: Experiment, steps: int) -> dict[str, Any]:
  """The content of experiment.json."""
  return {"steps": steps, **to_plain(experiment)}


def read_experiment(directory: pathlib.Path) -> Experiment:
  """The experiment that a run directory holds, its data axis open again for the devices that there are now.

  Raises:
    UserError: there is no run, or its experiment.json is not an experiment.
  """
  path = directory / RUN
  if not path.is_file():
    raise UserError(f"{path} does not exist; name a directory that `moejax train` wrote")
  try:
    plain = json.loads(path.read_text())
    if isinstance(plain, dict):
      plain.pop("steps", None)
    experiment = from_plain(Experiment, plain)
  except ValueError as error:
    raise UserError(f"{path} is no experiment: {error}") from error
  return dataclasses.replace(experiment, mesh=dataclasses.replace(experiment.mesh, data=None))


def check_only_operational(there: Experiment, here: Experiment) -> None:
  """Raises UserError where two experiments differ in more than how a result is computed."""
  differences = _differences(to_plain(there), to_plain(here))
  if differences:
    raise UserError(f"a trained run is as it is: {'; '.join(differences)}; only {', '.join(OPERATIONAL)} may be set")


def claim_json(directory: pathlib.Path, file: str, content: dict[str, Any]) -> None:
  """Writes `content`, a configuration, to `file` of a directory, or checks that what is there is the same.

  Raises:
    UserError: another configuration is there, or the directory cannot be written.
  """
  check_json(directory, file, content)
  write_json(directory / file, content)


def check_json(directory: pathlib.Path, file: str, content: dict[str, Any], unknown: tuple[str, ...] = ()) -> None:
  """As `claim_json`, but leaves nothing in the directory, which it makes. Keys that are `unknown` yet may differ."""
  prepare_directory(directory)
  for kind, other in (("run", RUN), ("comparison", COMPARISON)):
    if other != file and (directory / other).exists():
      raise UserError(f"{directory} holds a {kind}; choose another --workdir")
  path = directory / file
  if not path.exists():
    return
  try:
    there = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}); choose another --workdir") from error
  if isinstance(there, dict):
    there = {name: value for name, value in there.items() if name not in unknown}
  differences = _differences(there, json.loads(json.dumps(content)))
  if differences:
    raise UserError(
      f"{directory} holds another configuration: {'; '.join(differences[:3])}"
      f"{f' and {len(differences) - 3} more' if len(differences) > 3 else ''}; choose another --workdir, "
      "or change the configuration back to continue what is there"
    )


def prepare_file(path: pathlib.Path, option: str) -> None:
  """Makes the directory of a file that is written later, and tries to write to it.

  Raises:
    UserError: as `prepare_directory`, or `path` is a directory.
  """
  if path.is_dir():
    raise UserError(f"cannot write to {path}: it is a directory; name a file in {option}")
  prepare_directory(path.parent, option)


def prepare_directory(directory: pathlib.Path, option: str = "--workdir") -> None:
  """Makes a directory, which `option` names, and tries to write to it.

  Raises:
    UserError: it is a file, is not permitted, or the disk is full.
  """
  probe = directory / ".probe"
  try:
    directory.mkdir(parents=True, exist_ok=True)
    try:
      probe.write_bytes(bytes(4096))
    finally:
      probe.unlink(missing_ok=True)
  except OSError as error:
    reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
    raise UserError(f"cannot write to {directory}: {reason}; choose another {option}") from error


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a JSON file so that a reader, or a kill, sees the old one or the new one and nothing between."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")
  temporary.replace(path)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
  """Dotted fields in which two configurations differ, with both values."""
  if path in OPERATIONAL or old == new:
    return []
  if isinstance(old, dict) and isinstance(new, dict):
    names = [*old, *(name for name in new if name not in old)]
    return [line for name in names for line in _differences(old.get(name), new.get(name), _join(path, name))]
  if _is_of_records(old) and _is_of_records(new) and len(old) == len(new):
    return [line for i in range(len(old)) for line in _differences(old[i], new[i], _join(path, str(i)))]
  return [f"{path} is {_short(old)} there and {_short(new)} here"]


def _join(path: str, name: str) -> str:
  return f"{path}.{name}" if path else name


def _is_of_records(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _short(value: Any) -> str:
  """A value for one line."""
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."


def _finite(content: Any) -> Any:
  """The same with null for what JSON cannot say: a standard error of a single document is not a number."""
  if isinstance(content, dict):
    return {name: _finite(value) for name, value in content.items()}
  if isinstance(content, list | tuple):
    return [_finite(value) for value in content]
  return None if isinstance(content, float) and not math.isfinite(content) else content
