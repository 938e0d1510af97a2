"""Reads the size, the tokens and the held-out loss of finished runs."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from moejax.errors import UserError, reason
from moejax.evaluation.held_out import HeldOut
from moejax.files import read_json
from moejax.scaling.rows import LIMITS, SHAPE, check_row, shape_of_row
from moejax.scaling.shapes import Shape, shape_of
from moejax.training.run_directory import ORIGIN, read_experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedRun:
  """One trained model, to which a law can be fitted."""

  name: str
  shape: Shape
  tokens: float
  """Training tokens."""
  loss: float
  """Cross-entropy on held-out text in nats per token."""

  @property
  def flops(self) -> float:
    return self.shape.training_flops * self.tokens

  def to_json(self) -> dict[str, Any]:
    """Plain values, as `read_runs` reads them."""
    return {
      "name": self.name,
      "active_parameters": self.shape.active,
      "total_parameters": self.shape.total,
      "embedding_parameters": self.shape.embedding,
      "expansion": self.shape.expansion,
      "granularity": self.shape.granularity,
      "flops_per_token": self.shape.training_flops,
      "tokens": self.tokens,
      "loss": self.loss,
    }


def read_runs(paths: Sequence[pathlib.Path]) -> tuple[FinishedRun, ...]:
  """Reads finished runs.

  Args:
    paths: run directories, comparison directories (all of their finished runs that are not upcycled), and JSON files
      with a list of runs, or with such a list under the key "runs", as `moejax fit --json` writes it.

  An object of a JSON file has the keys name, active_parameters, total_parameters, tokens and loss, and may have
  embedding_parameters, expansion, granularity and flops_per_token (see `moejax.scaling.shapes.Shape`).

  Raises:
    UserError: If a path has no finished run, a run is given twice, or the runs were scored on different held-out text.
  """
  found: list[FinishedRun] = []
  scored: dict[tuple[int, int], pathlib.Path] = {}
  for path in paths:
    if path.suffix == ".json" and path.is_file():
      found += _of_file(path)
      continue
    for directory in _directories(path):
      run, text = _of_directory(directory)
      scored.setdefault(text, directory)
      found.append(run)
  if len(scored) > 1:
    first, second = list(scored.values())[:2]
    raise UserError(
      f"{first} and {second} were scored on different held-out text or with different tokenizers, so that their losses "
      "cannot be compared; fit them separately"
    )
  _check_distinct(found)
  return tuple(found)


def _check_distinct(runs: Sequence[FinishedRun]) -> None:
  """Raises UserError if a run is given twice, which would count as two."""
  seen: dict[FinishedRun, str] = {}
  for run in runs:
    unnamed = dataclasses.replace(run, name="")
    if unnamed in seen:
      raise UserError(f"{seen[unnamed]} and {run.name} are the same run; give each run once")
    seen[unnamed] = run.name


def _directories(path: pathlib.Path) -> Iterable[pathlib.Path]:
  if (path / "summary.json").is_file():
    return (path,)
  runs = sorted(summary.parent for summary in path.glob("runs/*/summary.json"))
  # The tokens of an upcycled run are not all that its parameters were trained on.
  runs = [run for run in runs if not (run / ORIGIN).exists()]
  if not runs:
    raise UserError(
      f"{path} has no finished run; give the directory of a finished run or comparison, or a JSON file with a list of "
      "runs"
    )
  return runs


def _of_directory(directory: pathlib.Path) -> tuple[FinishedRun, tuple[int, int]]:
  """The run, and the number of targets and bytes of its held-out text."""
  experiment, held_out = read_experiment(directory), HeldOut.load(directory / "held_out.npz")
  try:
    summary = read_json(directory / "summary.json")
    name, tokens = str(summary["name"]), float(summary["tokens"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"{directory / 'summary.json'} is damaged ({reason(error)[:100]}); run the command again"
    ) from error
  targets = int(held_out.targets.sum())
  if not targets or not tokens:
    raise UserError(f"{directory} was not scored on held-out text; give runs with held-out documents")
  loss = float(held_out.nats.sum()) / targets
  for key, value in {"loss": loss, "tokens": tokens}.items():
    low, high = LIMITS[key]
    if not low <= value <= high:
      raise UserError(
        f"{directory} is damaged: its {key}={value:g} must lie between {low:g} and {high:g}; run it again"
      )
  run = FinishedRun(name=f"{name} ({directory})", shape=shape_of(experiment), tokens=tokens, loss=loss)
  return run, (targets, int(held_out.text_bytes.sum()))


def _of_file(path: pathlib.Path) -> list[FinishedRun]:
  try:
    rows = read_json(path)
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {reason(error)[:100]}") from error
  if isinstance(rows, dict):
    rows = rows.get("runs")
  if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
    raise UserError(f"{path} does not contain a list of objects, one per run")
  return [_of_row(path, number, row) for number, row in enumerate(rows, 1)]


NEEDED = ("active_parameters", "total_parameters", "tokens", "loss")
KEYS = ("name", *NEEDED, *(key for key in SHAPE if key not in NEEDED))


def _of_row(path: pathlib.Path, number: int, row: dict[str, Any]) -> FinishedRun:
  where = f"{path}, run {number}"
  check_row(where, row, NEEDED, KEYS)
  shape = shape_of_row(where, row)
  return FinishedRun(name=row.get("name", f"run {number}"), shape=shape, tokens=row["tokens"], loss=row["loss"])
