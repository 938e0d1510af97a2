"""What a step reports: one flat dictionary of plain numbers, to metrics.jsonl and TensorBoard."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorboardX

from moejax.config.model import Model
from moejax.files import finite, write_whole

Record = dict[str, Any]


def flatten(metrics: Mapping[str, Any], model: Model) -> Record:
  """The step's metrics as plain numbers, routing statistics by layer.

  Scalars keep their names. Of a sparse layer i: `router/entropy/layer_i` in nats, `router/dropped_fraction/layer_i`,
  `router/load_max_over_mean/layer_i` (1 when balanced). `router/load` is a list by sparse layer of each expert's share.
  """
  record: Record = {}
  for name, value in metrics.items():
    array = np.asarray(value)
    if array.ndim == 0:
      record[name] = float(array)
    elif array.ndim == 1:
      layers = sparse_layers(model) if len(array) == model.num_sparse_layers else all_layers(model)
      record |= {f"{name}/{layer}": float(x) for layer, x in zip(layers, array, strict=True)}
  if "router/load" in metrics:
    load_LE = np.asarray(metrics["router/load"])
    peak_L = load_LE.max(axis=1) * load_LE.shape[1]
    record |= {
      f"router/load_max_over_mean/{layer}": float(x) for layer, x in zip(sparse_layers(model), peak_L, strict=True)
    }
    record["router/load"] = [[round(float(share), 5) for share in load_E] for load_E in load_LE]
  return record


def sparse_layers(model: Model) -> list[str]:
  """Names of the sparse layers, numbered from 0 among all layers."""
  return all_layers(model)[model.period - 1 :: model.period]


def all_layers(model: Model) -> list[str]:
  """Names of all layers, from 0."""
  return [f"layer_{layer:02d}" for layer in range(model.num_layers)]


class MetricsWriter:
  """Appends records to metrics.jsonl and tensorboard/ of a run directory.

  Every line is valid JSON: a value that is NaN or infinite is null there, and absent in TensorBoard.
  """

  def __init__(self, directory: pathlib.Path, start_step: int):
    """Opens the files, dropping what was written after `start_step`: those steps are about to be done again."""
    self._path = directory / "metrics.jsonl"
    kept = [record for record in map(json.loads, _lines(self._path)) if record["step"] <= start_step]
    write_whole(self._path, "".join(map(_line, kept)))
    self.evaluated = any(record["step"] == start_step and "loss" not in record for record in kept[-1:])
    """Whether the scores of `start_step` are written."""
    self._file = self._path.open("a", buffering=1)
    self._board = tensorboardX.SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1)

  def write(self, record: Record) -> None:
    """Writes one step's record; `step` is its number."""
    self._file.write(_line(record))
    for name, value in record.items():
      if isinstance(value, int | float) and name != "step" and math.isfinite(value):
        self._board.add_scalar(name, value, record["step"])

  def close(self) -> None:
    """Flushes both."""
    self._file.close()
    self._board.close()


def _line(record: Record) -> str:
  return json.dumps(finite(record), allow_nan=False) + "\n"


def _lines(path: pathlib.Path) -> list[str]:
  """Whole lines of a JSONL file, empty where there is none."""
  if not path.exists():
    return []
  return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
