"""The files that the stages of a comparison leave, read and checked: what is damaged is made again where it can be."""

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
"""What summary.json has of every run."""

SCORES = ("bits_per_byte", "bits_per_byte_stderr", "accuracy", "accuracy_stderr", "targets", "documents")


BASELINES = {field.name for field in dataclasses.fields(Baselines)} - {"more"}


def read_baselines(path: pathlib.Path, warn: Warn) -> Baselines | None:
  """The n-gram baselines; None where there are none, or where they are damaged, as they are counted in no time."""
  if not path.exists():
    return None
  try:
    found = read_json(path)
    if found.keys() == BASELINES and all(map(_is_score, found.values())):
      return Baselines(**found)
  except (OSError, ValueError, AttributeError):
    pass
  warn(f"{path} is damaged; the baselines are counted again")
  return None


def read_measurements(path: pathlib.Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
  """The fields of the timings of the members of these names.

  Raises:
    UserError: the file is damaged. They are not measured again: other step times would give other budgets to members
      that are trained already.
  """
  try:
    found = read_json(path)
    if set(found) == set(names) and all(_is_timing(Timing(**timing)) for timing in found.values()):
      return found
  except (OSError, ValueError, AttributeError, TypeError):
    pass
  raise UserError(
    f"{path} is damaged; put a copy in its place, or delete it to measure again, which gives members that are not "
    "trained yet another length"
  )


def read_result(run_directory: pathlib.Path, steps: int, warn: Warn) -> tuple[dict[str, Any], HeldOut] | None:
  """summary.json and held_out.npz of a run of so many steps.

  None where it is not at its end, or where one of them is damaged: its newest checkpoint is then evaluated again.
  """
  path = run_directory / "summary.json"
  if not path.exists():
    return None
  try:
    summary = read_json(path)
    numbers = [summary[name] for name in SUMMARY_NUMBERS]
    if not all(map(known, numbers)) or not all(_is_score(summary[f"held_out/{name}"]) for name in SCORES):
      raise ValueError("its numbers are not those of a run")
    return (summary, _scores(run_directory, summary)) if summary["steps"] == steps else None
  except (OSError, ValueError, KeyError, TypeError) as error:
    warn(f"{error if isinstance(error, UserError) else f'{path} is damaged'}; the run is evaluated again")
    return None


def _scores(run_directory: pathlib.Path, summary: dict[str, Any]) -> HeldOut:
  """Raises UserError where the scores are not those that the summary was made of."""
  path = run_directory / "held_out.npz"
  held_out = HeldOut.load(path)
  here = finite(held_out.summary())
  if any(not _are_equal(here[name], summary[f"held_out/{name}"]) for name in SCORES):
    raise UserError(f"{path} and {run_directory / 'summary.json'} do not belong together")
  return held_out


def _is_timing(timing: Timing) -> bool:
  values = dataclasses.asdict(timing)
  samples = values.pop("samples_s")
  optional = ("peak_flops", "choices_per_token", "dropped_fraction")
  numbers = [value for name, value in values.items() if value is not None or name not in optional]
  return isinstance(samples, list) and all(map(known, [*numbers, *samples])) and timing.step_time_s > 0


def _is_score(value: Any) -> bool:
  """Whether it is a number, or null for one that could not be computed."""
  return value is None or known(value)


def _are_equal(a: float | None, b: float | None) -> bool:
  return a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-9)
