"""Reads and checks the files of the stages of a comparison. Damaged files are made again if possible.

Z = points of a curve  L stacked layers
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moejax.comparison import curves
from moejax.comparison.fairness import relative_curve
from moejax.comparison.measurements import Measurements, measurements_from_json
from moejax.comparison.record import Baselines, known
from moejax.config.experiment import Suite
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


@dataclasses.dataclass(frozen=True)
class Result:
  """The result of one run."""

  summary: Mapping[str, Any]
  """summary.json."""
  held_out: HeldOut
  """Scores of each held-out document."""
  relative_Z: np.ndarray | None = None
  """Training loss at `fairness.POINTS`, relative to that at the end."""
  routers: Mapping[str, float] = dataclasses.field(default_factory=dict)
  """Router metrics over the last tenth of training, averaged over layers."""


def read_measurements(path: pathlib.Path, suite: Suite) -> Measurements:
  """Reads the measured step times of the members of a suite.

  Raises:
    UserError: If the file is damaged. Step times are not measured again automatically, since other step times would
      change the budgets of members that have been trained.
  """
  try:
    return measurements_from_json(read_json(path), [[member.name for member in pair.members] for pair in suite.pairs])
  except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
    raise UserError(
      f"{path} is damaged; restore a copy, or delete it to measure again, which changes the length of members that "
      "have not been trained yet"
    ) from error


def read_result(run_directory: pathlib.Path, steps: int, warn: Warn) -> Result | None:
  """Reads summary.json, held_out.npz and the training loss of a run of `steps` steps.

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
    if summary["steps"] != steps:
      return None
    held_out, metrics = _scores(run_directory, summary), curves.read_metrics(run_directory / "metrics.jsonl")
    steps_Z, loss_Z = curves.series(metrics, "loss")
    return Result(summary, held_out, relative_curve(steps_Z, curves.smooth(steps_Z, loss_Z)), _routers(metrics))
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


def _routers(metrics: curves.Metrics) -> dict[str, float]:
  """Router metrics over the last tenth of training, averaged over layers, by the field of `record.Member`."""
  found = {}
  for name in ("dropped_fraction", "load_max_over_mean"):
    _, layers, values_ZL = curves.per_layer(metrics, f"router/{name}")
    if layers:
      found[f"{name}_trained"] = float(curves.last_tenth(values_ZL).mean())
  return found


def _is_score(value: Any) -> bool:
  """Whether a value is a number, or None for a score that could not be computed."""
  return value is None or known(value)


def _are_equal(a: float | None, b: float | None) -> bool:
  return a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-9)
