"""Reads and checks the files of the stages of a comparison. Damaged files are made again if possible."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from moejax.comparison.measure import Timing
from moejax.comparison.record import Baselines, known
from moejax.errors import UserError
from moejax.evaluation.held_out import HeldOut
from moejax.files import finite, read_json

Warn = Callable[[str], None]

SUMMARY_NUMBERS = ("steps", "tokens", "train_time_s", "tokens_per_s", "seed")
"""Keys that summary.json has in every run."""

SCORES = ("bits_per_byte", "bits_per_byte_stderr", "accuracy", "accuracy_stderr", "targets", "documents")


BASELINES = {field.name for field in dataclasses.fields(Baselines)} - {"more"}


def read_baselines(path: pathlib.Path, warn: Warn) -> Baselines | None:
  """Reads the n-gram baselines. Returns None if they are missing or damaged, since they can be computed again
  quickly."""
  if not path.exists():
    return None
  try:
    found = read_json(path)
    if found.keys() == BASELINES and all(map(_is_score, found.values())):
      return Baselines(**found)
  except (OSError, ValueError, AttributeError):
    pass
  warn(f"{path} is damaged; the baselines are computed again")
  return None


def read_measurements(path: pathlib.Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Reads the timings of the members with these names.

  Raises:
    UserError: If the file is damaged. Step times are not measured again automatically, since other step times would
      change the budgets of members that have been trained.
  """
  try:
    found = read_json(path)
    if set(found) == set(names) and all(_is_timing(Timing(**timing)) for timing in found.values()):
      return found
  except (OSError, ValueError, AttributeError, TypeError):
    pass
  raise UserError(
    f"{path} is damaged; restore a copy, or delete it to measure again, which changes the length of members that have "
    "not been trained yet"
  )


def read_result(run_directory: pathlib.Path, steps: int, warn: Warn) -> tuple[dict[str, Any], HeldOut] | None:
  """Reads summary.json and held_out.npz of a run of `steps` steps.

  Returns None if the run is not complete or a file is damaged. The latest checkpoint is then evaluated again.
  """
  path = run_directory / "summary.json"
  if not path.exists():
    return None
  try:
    summary = read_json(path)
    numbers = [summary[name] for name in SUMMARY_NUMBERS]
    if not all(map(known, numbers)) or not all(_is_score(summary[f"held_out/{name}"]) for name in SCORES):
      raise ValueError("its values are not valid")
    return (summary, _scores(run_directory, summary)) if summary["steps"] == steps else None
  except (OSError, ValueError, KeyError, TypeError) as error:
    warn(f"{error if isinstance(error, UserError) else f'{path} is damaged'}; the run is evaluated again")
    return None


def _scores(run_directory: pathlib.Path, summary: dict[str, Any]) -> HeldOut:
  """Reads the scores. Raises UserError if they do not match the summary."""
  path = run_directory / "held_out.npz"
  held_out = HeldOut.load(path)
  here = finite(held_out.summary())
  if any(not _are_equal(here[name], summary[f"held_out/{name}"]) for name in SCORES):
    raise UserError(f"{path} does not match {run_directory / 'summary.json'}")
  return held_out


def _is_timing(timing: Timing) -> bool:
  values = dataclasses.asdict(timing)
  samples = values.pop("samples_s")
  optional = ("peak_flops", "choices_per_token", "dropped_fraction")
  numbers = [value for name, value in values.items() if value is not None or name not in optional]
  return isinstance(samples, list) and all(map(known, [*numbers, *samples])) and timing.step_time_s > 0


def _is_score(value: Any) -> bool:
  """Whether a value is a number, or None for a score that could not be computed."""
  return value is None or known(value)


def _are_equal(a: float | None, b: float | None) -> bool:
  return a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-9)
