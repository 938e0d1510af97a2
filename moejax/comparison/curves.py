"""Reads metrics.jsonl, and extracts series from it for plots.

L stacked layers  E experts  Z = points of a curve  Y = columns of a heat map
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.comparison.record import known
from moejax.files import parse_record

Metrics = Sequence[dict[str, Any]]


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the records of a metrics.jsonl, sorted by step. Returns an empty list if the file does not exist.

  Invalid lines are ignored, since a killed process can leave an incomplete line. Lines of the same step are merged, and
  later values replace earlier ones: an evaluation is a separate line, and a run that resumes from a checkpoint writes
  the later steps again.
  """
  if not path.is_file():
    return []
  by_step: dict[float, dict[str, Any]] = {}
  for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
    values = parse_record(line)
    if values is not None and known(values.get("step")):
      by_step.setdefault(values["step"], {}).update(values)
  return [by_step[step] for step in sorted(by_step)]


def series(metrics: Metrics, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of a metric, without values that are not finite."""
  rows = [(row["step"], row[name]) for row in metrics if known(row.get(name))]
  steps_Z, values_Z = np.array(rows, dtype=float).reshape(-1, 2).T
  return steps_Z, values_Z


def smooth(steps_Z: np.ndarray, values_Z: np.ndarray, width: float = 0.1) -> np.ndarray:
  """Moving mean over the points from step / (1 + width) to step x (1 + width), a window of constant width on a log
  axis.

  It preserves the steep start of a curve and removes the noise of its flat end.
  """
  if not len(steps_Z):
    return values_Z
  sums = np.concatenate([[0.0], np.cumsum(values_Z)])
  # The margin keeps points on the edge of the window inside it, despite rounding.
  first = np.searchsorted(steps_Z, steps_Z / (1 + width) * (1 - 1e-9), side="left")
  last = np.searchsorted(steps_Z, steps_Z * (1 + width) * (1 + 1e-9), side="right")
  return (sums[last] - sums[first]) / (last - first)


def thin(steps_Z: np.ndarray, *values_Z: np.ndarray, points: int = 500) -> tuple[np.ndarray, ...]:
  """Selects about `points` points, evenly spaced on a log axis, including the first and the last."""
  size = len(steps_Z)
  if size <= points:
    return steps_Z, *values_Z
  even = np.geomspace(1, size, points).round().astype(int) - 1
  linear = np.linspace(0, size - 1, points // 4).round().astype(int)
  keep = np.unique(np.concatenate([even, linear]))
  return steps_Z[keep], *(values[keep] for values in values_Z)


def relative_load(metrics: Metrics) -> tuple[np.ndarray, np.ndarray]:
  """Steps [Z] and relative load of each expert [Z, L, E]: fraction of choices x number of experts, 1 if balanced."""
  rows = [(row["step"], np.array(row["router/load"], dtype=float)) for row in metrics if _is_load(row)]
  rows = [(step, load) for step, load in rows if load.shape == rows[-1][1].shape]
  if not rows:
    return np.zeros(0), np.zeros((0, 0, 0))
  load_ZLE = np.stack([load for _, load in rows])
  return np.array([step for step, _ in rows], dtype=float), load_ZLE * load_ZLE.shape[-1]


def per_layer(metrics: Metrics, name: str, of: str = "layer") -> tuple[np.ndarray, list[int], np.ndarray]:
  """Steps [Z], layer numbers [L] and values [Z, L] of `name`/layer_NN, at the steps that have every layer. Those of
  multi-token prediction are `of` "multi_token"."""
  pattern = re.compile(re.escape(name) + rf"/{of}_(\d+)")
  keys = {key: int(match[1]) for row in metrics for key in row if (match := pattern.fullmatch(key))}
  ordered = sorted(keys, key=lambda key: keys[key])
  rows = [[row["step"], *(row[key] for key in ordered)] for row in metrics if all(known(row.get(k)) for k in ordered)]
  if not keys or not rows:
    return np.zeros(0), [], np.zeros((0, 0))
  table = np.array(rows, dtype=float)
  return table[:, 0], [keys[key] for key in ordered], table[:, 1:]


def layer_names(metrics: Metrics, sparse_layers: int) -> list[str]:
  """Labels of the rows of `router/load`: the layer numbers of the metrics, or else consecutive numbers."""
  layers, modules = (per_layer(metrics, "router/load_max_over_mean", of)[1] for of in ("layer", "multi_token"))
  if len(layers) + len(modules) == sparse_layers:
    return [f"layer {layer}" for layer in layers] + [f"multi-token {depth}" for depth in modules]
  return [f"sparse layer {i + 1}" for i in range(sparse_layers)]


def columns(steps_Z: np.ndarray, values_Z: np.ndarray, most: int = 160) -> tuple[np.ndarray, np.ndarray]:
  """Edges [Y + 1] and values [Y, ...] of at most `most` columns of a heat map, each the mean of neighboring points."""
  size = len(steps_Z)
  starts = np.unique(np.linspace(0, size, min(most, size), endpoint=False).astype(int))
  counts = np.diff(np.append(starts, size))
  sums = np.add.reduceat(values_Z, starts, axis=0)
  means = sums / counts.reshape(-1, *[1] * (values_Z.ndim - 1))
  between = (steps_Z[starts[1:]] + steps_Z[starts[1:] - 1]) / 2
  # A single point has the width of all steps before it.
  before = max(0.0, steps_Z[0] - (steps_Z[1] - steps_Z[0]) / 2) if size > 1 else 0.0
  return np.concatenate([[before], between, [steps_Z[-1]]]), means


def last_tenth(values_Z: np.ndarray) -> np.ndarray:
  """Mean over the last tenth of the points."""
  return values_Z[-max(1, len(values_Z) // 10) :].mean(axis=0)


def _is_load(row: dict[str, Any]) -> bool:
  load = row.get("router/load")
  if not isinstance(load, list) or not load or not all(isinstance(layer, list) and layer for layer in load):
    return False
  return len({len(layer) for layer in load}) == 1 and all(known(share) for layer in load for share in layer)
