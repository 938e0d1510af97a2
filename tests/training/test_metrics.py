"""Records: routing by layer, and files that survive a kill."""

import dataclasses
import json
import math

import numpy as np
from training_fixtures import read_metrics, tiny

from moejax.training.metrics import MetricsWriter, flatten, sparse_layers


def test_routing_statistics_are_named_by_the_layer_they_come_from():
  model = dataclasses.replace(tiny(True).model, num_layers=4)
  load_LE = np.array([[0.125] * 8, [0.5, 0.5] + [0.0] * 6])
  record = flatten({"loss": np.float32(2.0), "router/load": load_LE, "router/entropy": np.array([1.0, 0.5])}, model)
  assert record["loss"] == 2.0
  assert (record["router/entropy/layer_01"], record["router/entropy/layer_03"]) == (1.0, 0.5)
  assert record["router/load_max_over_mean/layer_01"] == 1.0
  assert record["router/load_max_over_mean/layer_03"] == 4.0
  assert record["router/load"][1][:3] == [0.5, 0.5, 0.0]
  json.dumps(record)


def test_sparse_layers_are_the_last_of_each_period():
  assert sparse_layers(dataclasses.replace(tiny(True).model, num_layers=4)) == ["layer_01", "layer_03"]
  assert sparse_layers(tiny(False).model) == ["layer_00", "layer_01"]


def test_lines_after_the_resumed_step_and_a_half_written_line_are_dropped(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
  writer = MetricsWriter(tmp_path, start_step=1)
  writer.write({"step": 2, "loss": 2.5})
  writer.close()
  assert read_metrics(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


def test_every_line_is_json_whatever_is_not_finite_and_whoever_wrote_the_lines_before(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
  writer = MetricsWriter(tmp_path, start_step=1)
  writer.write({"step": 2, "loss": math.nan, "loss/z": -math.inf, "router/load": [[0.5, math.nan]], "mfu": np.inf})
  writer.close()

  def refuse(constant):
    raise AssertionError(constant)

  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line, parse_constant=refuse) for line in lines] == [
    {"step": 1, "loss": None},
    {"step": 2, "loss": None, "loss/z": None, "router/load": [[0.5, None]], "mfu": None},
  ]
