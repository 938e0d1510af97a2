"""Every file that a plan reads may be damaged. It is then named in one line, or ignored, without a traceback."""

import copy
import dataclasses
import json

import pytest

from moejax.config import Mesh
from moejax.config.fields import with_fields
from moejax.errors import UserError
from moejax.planning.against import measured_step_s
from moejax.planning.calibration import TimedOperation, TimedStep, calibrated
from moejax.planning.compile import DURATIONS, _durations, _read, _write, _write_duration
from moejax.planning.load import plan_loads
from moejax.planning.topology import parse_topology
from moejax.training.run_directory import run_configuration

V5P, CPU = parse_topology("v5p:2x2x1"), parse_topology("cpu:8")

WRONG = (None, True, "x", "", -1, 0, 1e308, 5e-324, 10**400, [], {}, [[]], {"a": 1}, ["a"])


def damaged(content, path=()):
  """Copies of plain data in which one value is replaced or missing."""
  here = content
  for key in path:
    here = here[key]
  for wrong in WRONG:
    yield _with(content, path, wrong)
  for key in here if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ():
    yield _with(content, (*path, key))
    yield from damaged(content, (*path, key))


def _with(content, path, *value):
  """A copy with another value at a path, or without it if no value is given."""
  if not path:
    return value[0]
  found = copy.deepcopy(content)
  here = found
  for key in path[:-1]:
    here = here[key]
  if value:
    here[path[-1]] = value[0]
  else:
    del here[path[-1]]
  return found


def texts(content):
  """The text of damaged data, and damaged text."""
  whole = json.dumps(content).encode()
  yield from (json.dumps(one).encode() for one in damaged(content))
  yield from (b"", b"\0" * 50, b"\xff\xfe" + whole, whole[: len(whole) // 2], b"[" * 100_000, whole + b"}", b"NaN")


def in_one_line(read, *arguments) -> None:
  try:
    read(*arguments)
  except UserError as error:
    assert "\n" not in str(error) and len(str(error)) < 700


def test_a_damaged_calibration_file(tmp_path):
  step = TimedStep(experiment="a", topology="v5p:2x2x1", slices=1, mesh={"data": 4}, matrix_s=0.6, kernel_s=0.1,
                   memory_s=0.2, exposed_s=0.05, predicted_s=1.0, measured_s=1.1)  # fmt: skip
  operation = TimedOperation(name="product", kind="matrix", predicted_s=1.0, measured_s=2.0)
  of_chip = {"operations": [dataclasses.asdict(operation)], "overhead_s": 1e-4, "steps": [dataclasses.asdict(step)]}
  file = tmp_path / "mine.json"
  for text in texts({"format": 1, "chips": {"v5p": of_chip}}):
    file.write_bytes(text)
    in_one_line(calibrated, V5P, file)


def test_a_damaged_run(tiny_moe, tmp_path, monkeypatch):
  tiny_moe = dataclasses.replace(with_fields(tiny_moe, {"model.moe.dispatch": "grouped"}), mesh=Mesh(data=4, expert=2))
  monkeypatch.setattr("moejax.planning.measured_run.read_experiment", lambda _: tiny_moe)
  monkeypatch.setattr("moejax.planning.load.plan", lambda changed, *_, load: None)
  moe = tiny_moe.model.moe
  record = {"step": 1, "step_time_s": 0.25, "router/load": [[1 / moe.num_experts] * moe.num_experts]}
  record["router/load"] *= tiny_moe.model.num_sparse_layers
  summary = {"provenance": {"device_kind": "cpu", "device_count": 8}}
  good = {
    "experiment.json": run_configuration(tiny_moe, 9), "summary.json": summary, "metrics.jsonl": record,
  }  # fmt: skip
  for name, content in good.items():
    (tmp_path / name).write_text(json.dumps(content) + "\n")
  metrics = (tmp_path / "metrics.jsonl").read_bytes()
  (tmp_path / "metrics.jsonl").write_bytes(metrics * 3)
  assert measured_step_s(str(tmp_path), tiny_moe, CPU) == 0.25
  for name in ("summary.json", "metrics.jsonl"):
    whole = (tmp_path / name).read_bytes()
    for text in texts(good[name]):
      (tmp_path / name).write_bytes(text + b"\n" + (metrics if name == "metrics.jsonl" else b""))
      in_one_line(measured_step_s, str(tmp_path), tiny_moe, CPU)
      if name == "metrics.jsonl":
        in_one_line(plan_loads, tiny_moe, CPU, [str(tmp_path)])
    (tmp_path / name).write_bytes(whole)


def test_a_damaged_program_in_the_cache_is_compiled_again(tmp_path):
  found = ("HloModule m", {"total": 3}, 1.5)
  _write(tmp_path, *found)
  assert _read(tmp_path) == found
  for name in ("facts.json", "program.txt.gz"):
    whole = (tmp_path / name).read_bytes()
    contents = [
      whole[:-3],
      b"",
      b"x" * 30,
      *(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(10, len(whole))),
    ]
    if name == "facts.json":
      contents += texts(json.loads(whole))
    for content in contents:
      (tmp_path / name).write_bytes(content)
      assert _read(tmp_path) in (None, found)
    (tmp_path / name).write_bytes(whole)


def test_damaged_durations_are_ignored_and_written_again(tmp_path):
  for text in texts({"a v5p:2x2x1 1": 2.5}):
    (tmp_path / DURATIONS).write_bytes(text)
    assert all(0 <= seconds < 1e6 for seconds in _durations(tmp_path).values())
    _write_duration(tmp_path, "b", 3.0)
    assert _durations(tmp_path)["b"] == 3.0


@pytest.mark.parametrize("missing", ["summary.json", "metrics.jsonl", "experiment.json"])
def test_a_run_without_one_of_its_files(missing, tiny_dense, tmp_path):
  for name, content in (
    ("experiment.json", run_configuration(tiny_dense, 9)),
    ("summary.json", {}),
    ("metrics.jsonl", {}),
  ):
    if name != missing:
      (tmp_path / name).write_text(json.dumps(content))
  with pytest.raises(UserError, match=r"--against|experiment\.json"):
    measured_step_s(str(tmp_path), tiny_dense, CPU)
