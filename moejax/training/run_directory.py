"""The configuration in the directory of a run or a comparison, and whether a new one can resume it."""

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Collection
from typing import Any

from moejax.config.experiment import Experiment, Suite
from moejax.config.plain import from_plain, to_plain
from moejax.config.resume import changeable
from moejax.config.stored import EARLIER, current, read_experiment_file
from moejax.config.walk import join
from moejax.errors import UserError
from moejax.files import read_json, write_json

RUN, COMPARISON = "experiment.json", "suite.json"
"""Files with the configuration of a run and of a comparison."""

ORIGIN = "upcycled.json"
"""File of a run of a comparison that starts from another run, and says from which."""

STEP = re.compile(r"0|[1-9][0-9]{0,17}")
"""Names of the directories of complete checkpoints."""

LENGTH = ("steps", "training.steps", "training.budget", EARLIER)
"""Fields of the training length, which are compared by their result."""


def claim(directory: pathlib.Path, experiment: Experiment, steps: int) -> list[dict[str, int]]:
  """Writes experiment.json or, if it exists, checks that this experiment can resume the run. Returns the previous
  lengths of a run whose length was changed: the learning rate followed the schedule of `steps` up to `last_step`.

  Raises:
    UserError: If the directory contains another experiment or a longer run.
  """
  directory.mkdir(parents=True, exist_ok=True)
  there = check_run(directory, experiment, steps)
  done = saved_step(directory)
  # If a checkpoint was lost, the steps after the latest one are repeated with the current schedule.
  earlier = [length | {"last_step": min(length["last_step"], done)} for length in there.get(EARLIER, []) if done]
  if there and there["steps"] != steps and done > max((length["last_step"] for length in earlier), default=0):
    earlier = [*earlier, {"steps": there["steps"], "last_step": done}]
  write_json(directory / RUN, run_configuration(experiment, steps) | ({EARLIER: earlier} if earlier else {}))
  return earlier


def open_run(directory: pathlib.Path, experiment: Experiment, steps: int | None) -> pathlib.Path:
  """Creates a directory, if necessary, and checks that this run can use it. Writes no files. Returns the directory.

  `steps` is None if the budget determines the length and the text has not been read. The length is then not checked.

  Raises:
    UserError: If the directory contains another experiment or a longer run, or is not writable.
  """
  prepare_directory(directory)
  check_run(directory, experiment, steps)
  return directory


def check_run(directory: pathlib.Path, experiment: Experiment, steps: int | None) -> dict[str, Any]:
  """The content of experiment.json, or empty if there is none. Raises UserError if this run cannot resume it."""
  there = _held(directory, RUN, to_plain(experiment))
  if not there or steps is None or there.get("steps") == steps:
    return there
  if experiment.training.steps != steps:
    raise UserError(
      f"{directory} holds a run of {there['steps']} steps, but the budget of {experiment.name!r} is {steps} steps; "
      f"resume it with --training.steps {there['steps']}, or change its length with --training.steps N"
    )
  done = saved_step(directory)
  if steps < done:
    raise UserError(
      f"training.steps={steps} is less than the {done} steps that {directory} has trained; "
      f"use {done} or more, or choose another --workdir"
    )
  return there


def saved_step(directory: pathlib.Path) -> int:
  """Step of the latest checkpoint of a run, or 0."""
  return max(saved_steps(directory), default=0)


def saved_steps(directory: pathlib.Path) -> list[int]:
  """Steps of the checkpoints of a run, which may be damaged."""
  return [int(folder.name) for folder in (directory / "checkpoints").glob("*") if STEP.fullmatch(folder.name)]


def copy_start(directory: pathlib.Path, step: int, there: pathlib.Path) -> None:
  """Copies the checkpoint and the metrics of a run to the directory of another run, unless that one has started."""
  checkpoint = there / "checkpoints" / str(step)
  if (there / RUN).exists() or checkpoint.exists():
    return
  part = there / ".part"
  shutil.rmtree(part, ignore_errors=True)
  shutil.copytree(directory / "checkpoints" / str(step), part)
  shutil.copyfile(directory / "metrics.jsonl", there / "metrics.jsonl")
  checkpoint.parent.mkdir(exist_ok=True)
  part.rename(checkpoint)


def run_configuration(experiment: Experiment, steps: int) -> dict[str, Any]:
  """The content of experiment.json."""
  return {"steps": steps, **to_plain(experiment)}


def read_experiment(directory: pathlib.Path) -> Experiment:
  """The experiment of a run directory. mesh.data is None, so that all available devices are used.

  Raises:
    UserError: If there is no run, or its experiment.json is not valid.
  """
  path = directory / RUN
  if not path.is_file():
    raise UserError(f"{path} does not exist; give a directory written by `moejax train`")
  return read_experiment_file(path)


def check_only_operational(there: Experiment, here: Experiment) -> None:
  """Raises UserError if two experiments differ in fields that affect the trained parameters."""
  differences = _differences(to_plain(there), to_plain(here), _may_change(RUN))
  if differences:
    raise UserError(
      f"these fields of a trained run cannot change: {'; '.join(differences)}; those that can are "
      f"{', '.join(_may_change(RUN))}"
    )


def claim_comparison(directory: pathlib.Path, suite: Suite) -> None:
  """Writes suite.json or, if it exists, checks that this suite can resume the comparison.

  Raises:
    UserError: If the directory contains another suite.
  """
  directory.mkdir(parents=True, exist_ok=True)
  content = to_plain(suite)
  _held(directory, COMPARISON, content)
  write_json(directory / COMPARISON, content)


def open_comparison(directory: pathlib.Path, suite: Suite) -> pathlib.Path:
  """Creates a directory, if necessary, checks that this comparison can use it, and returns it. Writes no files.

  Raises:
    UserError: If the directory contains another suite or is not writable.
  """
  prepare_directory(directory)
  _held(directory, COMPARISON, to_plain(suite))
  return directory


def _held(directory: pathlib.Path, file: str, content: dict[str, Any]) -> dict[str, Any]:
  """The configuration in `file` of a directory, or empty if there is none. Raises UserError if it differs."""
  for kind, other in (("run", RUN), ("comparison", COMPARISON)):
    if other != file and (directory / other).exists():
      raise UserError(f"{directory} holds a {kind}; choose another --workdir")
  path = directory / file
  if not path.exists():
    return {}
  there = _read(path)
  ignored = (*_may_change(file), *(LENGTH if file == RUN else ()))
  differences = _differences(
    _with_defaults(there, Experiment if file == RUN else Suite), json.loads(json.dumps(content)), ignored
  )
  if differences:
    raise UserError(
      f"{directory} holds another configuration: {'; '.join(differences[:3])}"
      f"{f' and {len(differences) - 3} more' if len(differences) > 3 else ''}; choose another --workdir, "
      "or restore the configuration to resume"
    )
  return there


def _read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a configuration. Raises UserError if it is damaged."""
  try:
    there = current(read_json(path))
    lengths = [there.get("steps", 1), *(x for length in there.get(EARLIER, []) for x in length.values())]
    if all(type(length) is int for length in lengths) and (path.name != RUN or "steps" in there):
      return there
    why = "is damaged: the length of the run is not a number"
  except (OSError, ValueError) as error:
    why = f"is not JSON ({error})"
  except (AttributeError, KeyError, TypeError):
    why = "is damaged: it is not a configuration"
  raise UserError(f"{path} {why}; choose another --workdir, or restore a copy of the file")


def prepare_file(path: pathlib.Path, option: str) -> None:
  """Creates the directory of a file that is written later, and checks that it is writable.

  Raises:
    UserError: If it is not writable, or `path` is a directory.
  """
  if path.is_dir():
    raise UserError(f"cannot write to {path}: it is a directory; give a file in {option}")
  prepare_directory(path.parent, option)


def prepare_directory(directory: pathlib.Path, option: str = "--workdir") -> None:
  """Creates a directory, which is given by `option`, and checks that it is writable.

  Raises:
    UserError: If it is a file, permission is denied, or the disk is full.
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


def _with_defaults(there: dict[str, Any], kind: type[Experiment] | type[Suite]) -> dict[str, Any]:
  """Adds the defaults of fields that did not exist in the version that wrote a configuration."""
  own = {field.name for field in dataclasses.fields(kind)}
  try:
    whole = to_plain(from_plain(kind, {name: value for name, value in there.items() if name in own}))
  except UserError:
    return there  # not valid: the differences are reported
  return there | json.loads(json.dumps(whole))


def _may_change(file: str) -> tuple[str, ...]:
  """Fields that may change when a run or a comparison resumes."""
  return changeable(Experiment, "run") if file == RUN else changeable(Suite, "comparison")


def _differences(old: Any, new: Any, ignored: Collection[str], path: str = "") -> list[str]:
  """The fields in which two configurations differ, with both values."""
  if old == new or re.sub(r"\.\d+", ".*", path) in ignored:
    return []
  if isinstance(old, dict) and isinstance(new, dict):
    names = [*old, *(name for name in new if name not in old)]
    return [line for name in names for line in _differences(old.get(name), new.get(name), ignored, join(path, name))]
  if _is_of_records(old) and _is_of_records(new) and len(old) == len(new):
    return [line for i in range(len(old)) for line in _differences(old[i], new[i], ignored, join(path, str(i)))]
  return [f"{path} is {_short(old)} there and {_short(new)} here"]


def _is_of_records(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _short(value: Any) -> str:
  """A value in at most 60 characters."""
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
