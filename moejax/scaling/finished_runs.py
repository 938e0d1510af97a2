"""Reads the size, the tokens and the held-out loss of finished runs."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from moejax.errors import UserError, reason
from moejax.evaluation.held_out import HeldOut
from moejax.files import read_json
from moejax.scaling.shapes import Shape, shape_of
from moejax.training.run_directory import read_experiment


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
  """Reads run directories, comparison directories (all of their finished runs), and JSON files with a list of runs, or
  with such a list under the key "runs", as `moejax fit --json` writes it.

  An object of a JSON file has the keys name, active_parameters, total_parameters, tokens and loss, and may have
  embedding_parameters, expansion, granularity and flops_per_token (see `moejax.scaling.shapes.Shape`).

  Raises:
    UserError: If a path has no finished run, or the runs were scored on different held-out text.
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
  return tuple(found)


def _directories(path: pathlib.Path) -> Iterable[pathlib.Path]:
  if (path / "summary.json").is_file():
    return (path,)
  runs = sorted(summary.parent for summary in path.glob("runs/*/summary.json"))
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
OPTIONAL = ("embedding_parameters", "expansion", "granularity", "flops_per_token")


def _of_row(path: pathlib.Path, number: int, row: dict[str, Any]) -> FinishedRun:
  where = f"{path}, run {number}"
  if unknown := sorted(row.keys() - {"name", *NEEDED, *OPTIONAL}):
    raise UserError(f"{where}: unknown key {unknown[0]!r}; the keys are name, {', '.join((*NEEDED, *OPTIONAL))}")
  if missing := [key for key in NEEDED if key not in row]:
    raise UserError(f"{where} has no {missing[0]!r}")
  for key in (*NEEDED, *OPTIONAL):
    value = row.get(key)
    least = 1.0 if key in ("expansion", "granularity") else 0.0
    if key in row and (not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < 1e40):
      raise UserError(f"{where}: {key}={value!r} is not a number of at least {least:g}")
  if not 0 < row["active_parameters"] <= row["total_parameters"] or not row["tokens"] or not row["loss"]:
    raise UserError(f"{where}: active_parameters, tokens and loss must be above 0, and active at most total parameters")
  shape = Shape(
    active=row["active_parameters"],
    total=row["total_parameters"],
    embedding=row.get("embedding_parameters", 0.0),
    expansion=row.get("expansion", 1.0),
    granularity=row.get("granularity", 1.0),
    flops_per_token=row.get("flops_per_token"),
  )
  return FinishedRun(name=str(row.get("name", f"run {number}")), shape=shape, tokens=row["tokens"], loss=row["loss"])
