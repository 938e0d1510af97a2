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


def test_lines_that_are_no_records_are_dropped_and_counted(tmp_path):
  lines = [b'{"step": 1, "loss": 3.0}', b"\xff\xfe garbage", b"[1]", b'{"loss": 1.0}', b'{"step": "2"}', b"", b"7"]
  (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'\n{"step": 2, "loss": 2.0}\n{"step": 3')
  told = []
  writer = MetricsWriter(tmp_path, 2, told.append)
  writer.close()
  assert read_metrics(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
  assert told == [f"{tmp_path / 'metrics.jsonl'} had 6 lines that are not valid records; they have been removed"]


def test_a_full_disk_delays_lines_and_ends_the_file_of_tensorboard(tmp_path):
  told = []
  writer = MetricsWriter(tmp_path, 0, told.append)
  writer.write({"step": 1, "loss": 3.0})
  file, board = writer._file, writer._board
  writer._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
  writer._board._py_recordio_writer._writer = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
  writer.write({"step": 2, "loss": 2.0})
  assert len(told) == 2 and all("No space left" in text for text in told)
  writer._file.close()
  writer._file = file
  writer.write({"step": 3, "loss": 1.0})
  writer.close()
  assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3] and board is not None


def test_tensorboard_reads_what_is_written_and_forgets_what_is_done_again(tmp_path):
  from tensorboardX.proto.event_pb2 import SessionLog

  for start in (0, 1):
    writer = MetricsWriter(tmp_path, start)
    writer.write({"step": start + 1, "loss": 3.0 - start, "held_out/bits_per_byte": math.nan, "router/load": [[1.0]]})
    writer.close()
    events = events_of(max((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime))
    assert any(event.session_log.status == SessionLog.START and event.step == start + 1 for event in events)
    scalars = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert scalars == [(start + 1, "loss", 3.0 - start)]
    for path in (tmp_path / "tensorboard").iterdir():
      path.unlink()


def test_tensorboard_has_the_fields_of_the_experiment_as_hyperparameters(tmp_path):
  from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

  fields = {"name": "x", "model": {"num_layers": 2, "moe": None, "rope_theta": 1e4}, "data": {"train": ["a", "b"]}}
  (tmp_path / "experiment.json").write_text(json.dumps(fields))
  MetricsWriter(tmp_path, 0).close()
  (path,) = (tmp_path / "tensorboard").iterdir()
  values = [value for event in events_of(path) for value in event.summary.value]
  (started,) = [value for value in values if value.tag == "_hparams_/session_start_info"]
  told = HParamsPluginData.FromString(started.metadata.plugin_data.content).session_start_info.hparams
  assert {name: value.string_value or value.number_value for name, value in told.items()} == {
    "name": "x", "model.num_layers": 2.0, "model.moe": "null", "model.rope_theta": 1e4, "data.train": '["a", "b"]',
  }  # fmt: skip


def events_of(path):
  """The events of a file of TensorBoard. Each is its length (8 bytes), a checksum (4), its bytes, a checksum (4)."""
  from tensorboardX.proto.event_pb2 import Event

  content, events, at = path.read_bytes(), [], 0
  while at < len(content):
    size = int.from_bytes(content[at : at + 8], "little")
    events.append(Event.FromString(content[at + 12 : at + 12 + size]))
    at += size + 16
  return events
