"""Converts metrics of a step to a flat dictionary of numbers, and writes it to metrics.jsonl and TensorBoard.

L stacked layers  E experts
"""

import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import hparams

from moejax import processes
from moejax.config.model import Model
from moejax.files import finite, parse_record, read_json, write_whole

Record = dict[str, Any]

SCORE = "held_out/bits_per_byte"
"""The metric of an evaluation by which checkpoints are compared. Lower is better."""


def flatten(metrics: Mapping[str, Any], model: Model) -> Record:
  """The metrics of a step as numbers, with router metrics by layer.

  Scalars keep their names. A sparse layer i has `router/entropy/layer_i` in nats, `router/dropped_fraction/layer_i` and
  `router/load_max_over_mean/layer_i` (1 if balanced). `router/load` has the load of each expert, by sparse layer.
  """
  record: Record = {}
  for name, value in metrics.items():
    array = np.asarray(value)
    if array.ndim == 0:
      record[name] = float(array)
    elif array.ndim == 1:
      sparse = sparse_layers(model)
      layers = sparse if len(array) == len(sparse) else all_layers(model)
      layers = routed_layers(model) if name.startswith("router/depth_") else layers
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
  """Names of the sparse layers, numbered from 0 among all layers, and of those for multi-token prediction."""
  every = model.moe.every if model.moe else 1
  return _layers(model)[model.leading_layers + every - 1 :: every] + _modules(model)


def routed_layers(model: Model) -> list[str]:
  """Names of the layers that tokens can skip."""
  routed, repeated = model.routed_layers * model.num_periods, _layers(model)[model.leading_layers :]
  return [layer for layer, is_routed in zip(repeated, routed, strict=True) if is_routed]


def all_layers(model: Model) -> list[str]:
  """Names of all layers, from 0, and of those for multi-token prediction, from depth 1."""
  return _layers(model) + _modules(model)


def _layers(model: Model) -> list[str]:
  return [f"layer_{layer:02d}" for layer in range(model.num_layers)]


def _modules(model: Model) -> list[str]:
  return [f"multi_token_{depth}" for depth in range(1, model.multi_token_depth + 1)]


class MetricsWriter:
  """Appends records to metrics.jsonl and tensorboard/ of a run directory. Only the first process writes.

  Every line is valid JSON: values that are NaN or infinite are null, and missing in TensorBoard. A full disk does not
  stop training: `warn` is called, lines of metrics.jsonl are kept until they can be written, and TensorBoard logging
  ends.
  """

  def __init__(self, directory: pathlib.Path, start_step: int, warn: Callable[[str], None] = lambda text: None):
    """Opens the files. Removes records after `start_step`, which are repeated, and (with a warning) invalid lines."""
    self._path, self._warn = directory / "metrics.jsonl", warn
    writes = processes.is_first()
    records, damaged = _read(self._path) if writes else ([], 0)
    if damaged:
      warn(f"{self._path} had {damaged} lines that are not valid records; they have been removed")
    kept = [record for record in records if record["step"] <= start_step]
    self.repeated_s = _time_of([record for record in records if record["step"] > start_step], start_step)
    """Seconds that the removed steps took, as far as known."""
    write_whole(self._path, "".join(map(_line, kept)))
    self.scores: dict[int, float] = _scores(kept)
    """Held-out bits per byte of the evaluated steps, on process 0."""
    scored = any(record["step"] == start_step and "loss" not in record for record in kept[-1:])
    self.evaluated: bool = processes.first(lambda: scored)
    """Whether the last record contains an evaluation."""
    self._file = (self._path if writes else pathlib.Path(os.devnull)).open("ab", buffering=0)
    self._unwritten = b""
    self._board: EventsWriter | None = _open_board(directory / "tensorboard", start_step + 1) if writes else None

  def write(self, record: Record) -> None:
    """Writes the record of a step. `step` is its number."""
    self.evaluated = "loss" not in record
    self.scores |= _scores([record])
    self._unwritten += _line(record).encode()
    try:
      while self._unwritten:
        self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
    except OSError as error:
      self._warn(f"the metrics of step {record['step']} could not be written to {self._path}: {error.strerror}")
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
    values = [Summary.Value(tag=name, simple_value=x) for name, x in numbers.items() if math.isfinite(x)]
    self._to_board(lambda board: board.write_event(_event(record["step"], summary=Summary(value=values))))
    self._to_board(lambda board: board.flush())

  def close(self) -> None:
    """Flushes both."""
    self._file.close()
    self._to_board(lambda board: board.close())

  def _to_board(self, function: Callable[[EventsWriter], Any]) -> None:
    try:
      if self._board:
        function(self._board)
    except OSError as error:
      self._board = None
      self._warn(
        f"{self._path.with_name('tensorboard')} cannot be written; TensorBoard logging stops: {error.strerror}"
      )


def _time_of(records: list[Record], start_step: int) -> float:
  """Estimated seconds of the steps from `start_step` to the last record."""
  timed = [record for record in records if isinstance(record.get("step_time_s"), float)]
  return sum(
    (record["step"] - before) * record["step_time_s"]
    for before, record in zip([start_step, *(record["step"] for record in timed)], timed, strict=False)
  )


def read_scores(directory: pathlib.Path) -> dict[int, float]:
  """Held-out bits per byte of the evaluated steps of a run."""
  return _scores(_read(directory / "metrics.jsonl")[0])


def _scores(records: list[Record]) -> dict[int, float]:
  return {record["step"]: record[SCORE] for record in records if isinstance(record.get(SCORE), float)}


def _open_board(folder: pathlib.Path, first_step: int) -> EventsWriter:
  """Opens a new TensorBoard file, which discards records of earlier files from `first_step` on."""
  folder.mkdir(exist_ok=True)
  board = EventsWriter(str(folder / "events"))
  board.write_event(_event(first_step, session_log=SessionLog(status=SessionLog.START)))
  if hyperparameters := _hyperparameters(folder.with_name("experiment.json")):
    for summary in hparams(hyperparameters, {"loss": 0.0, SCORE: 0.0}):
      board.write_event(_event(first_step, summary=summary))
  return board


def _hyperparameters(path: pathlib.Path) -> dict[str, Any]:
  """The fields of an experiment by dotted name. Empty if the directory has none."""
  if not path.is_file():
    return {}
  found: dict[str, Any] = {}

  def add(values: Mapping[str, Any], prefix: str) -> None:
    for name, value in values.items():
      if isinstance(value, Mapping):
        add(value, f"{prefix}{name}.")
      else:
        found[f"{prefix}{name}"] = value if isinstance(value, str | int | float) else json.dumps(value)

  add(read_json(path), "")
  return found


def _event(step: int, **content: Any) -> Event:
  return Event(wall_time=time.time(), step=step, **content)


def _line(record: Record) -> str:
  return json.dumps(finite(record), allow_nan=False) + "\n"


def _read(path: pathlib.Path) -> tuple[list[Record], int]:
  """The records of a metrics.jsonl, and the number of invalid lines, without a truncated last line."""
  lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
  records = [_record(line) for line in lines[:-1]]
  return [record for record in records if record is not None], records.count(None)


def _record(line: bytes) -> Record | None:
  record = parse_record(line)
  return record if record is not None and type(record.get("step")) is int else None
