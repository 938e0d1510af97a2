"""A profiled step: its measured time by scope beside the predicted one."""

import json
import re

import pytest
from planning_programs import PROGRAMS, network_of, program

import moejax
from moejax.errors import UserError
from moejax.planning import profile
from moejax.planning.cost import SCOPES, cost
from moejax.planning.profile import NOTHING, by_part, key_of, measured_s, write_profile
from moejax.planning.program import DataDependentLoopError
from moejax.planning.trace import Event
from moejax.terminal import output
from moejax.training.profile import check_profile

NAMES = sorted(path.stem for path in PROGRAMS.glob("*.txt"))


@pytest.mark.parametrize("name", NAMES)
def test_measured_operations_have_the_parts_that_are_predicted(name):
  found, of = cost(program(name), network_of("v5p", (2, 2, 1))), program(name)
  predicted = by_part(found)
  assert sum(predicted.values()) == pytest.approx(found.step_time_s)
  assert predicted.keys() - {NOTHING} <= {key_of(of, operation) for operation in of.located}
  assert key_of(of, "absent.1") == ("-", "")


def test_a_loop_is_the_sum_of_its_parts_and_devices_are_averaged(monkeypatch):
  of = program("scan")
  (loop,) = [name for name, (_, one) in of.located.items() if one.opcode == "while"]
  body = of.computations[of.located[loop][1].called("body")[0]]
  inner = body.instructions[-1].name
  events = {"0": [Event(loop, 0, 100), Event(inner, 10, 30), Event(inner, 40, 60)], "1": [Event(inner, 0, 20)]}
  monkeypatch.setattr(profile, "read_events", lambda file, module: events)
  assert measured_s(of, "trace", "jit_step", steps=2) == {inner: pytest.approx((40 + 20) * 1e-9 / 2 / 2)}
  # A loop is counted as one operation if the trace does not list its parts.
  monkeypatch.setattr(profile, "read_events", lambda file, module: {"0": [Event(loop, 0, 100)]})
  assert measured_s(of, "trace", "jit_step", steps=1) == {loop: pytest.approx(100e-9)}
  monkeypatch.setattr(profile, "read_events", lambda file, module: {})
  with pytest.raises(UserError, match="has no operations of jit_step"):
    measured_s(of, "trace", "jit_step", steps=1)


def test_steps_that_are_not_there_cannot_be_profiled():
  check_profile(3, left=5, steps=9)
  with pytest.raises(UserError, match=r"--profile=0 must be at least 1"):
    check_profile(0, left=5, steps=9)
  with pytest.raises(UserError, match=r"--profile=4 needs 6 training steps, .* 5 of the 9 steps of this run are left"):
    check_profile(4, left=5, steps=9)


@pytest.mark.slow
def test_a_profiled_run_has_a_trace_and_a_table_of_its_scopes(tiny_moe, tmp_path, monkeypatch, capsys):
  (tmp_path / "held.txt").write_text("Another text. " * 50)
  (tmp_path / "text.txt").write_text("One text. " * 2000)
  fields = {"data.train": (str(tmp_path / "text.txt"),), "data.validation": (str(tmp_path / "held.txt"),)}
  experiment = moejax.replace(tiny_moe, **fields, **{"training.steps": 6})
  run = moejax.train(experiment, tmp_path / "run", profile=2)
  (folder,) = (tmp_path / "run" / "profile" / "plugins" / "profile").iterdir()
  assert {path.name.partition(".")[2] for path in folder.iterdir()} >= {"xplane.pb", "trace.json.gz", "json.gz"}
  found = write_profile(run.directory)
  assert (found.first_step, found.steps) == (3, 2)
  table = json.loads((run.directory / "profile" / "operations.json").read_text())
  assert table == json.loads(json.dumps(found.to_json()))
  scopes = {part.scope for part in found.parts if part.measured_s}
  assert {"embed", "attention", "router", "dispatch", "experts", "logits", "optimizer"} <= scopes
  assert scopes - {NOTHING[0], "-"} <= {*SCOPES}
  # The parts are the step: all that ran, and the rest.
  assert sum(part.measured_s for part in found.parts) == pytest.approx(found.step_time_s)
  assert 0 < sum(found.operations.values()) <= found.step_time_s
  assert sum(part.predicted_s for part in found.parts) == pytest.approx(found.predicted_s)
  assert not found.without_prediction
  output().print(found)
  assert re.search(r"^ *step +[\d.]+ +[\d.]+ +[\d.]+ *$", capsys.readouterr().out, re.M)

  def unpriced(*arguments, **named):
    raise DataDependentLoopError("while.3")

  monkeypatch.setattr(profile, "cost", unpriced)
  alone = write_profile(run.directory)
  assert alone.predicted_s is None and {part.predicted_s for part in alone.parts} == {None}
  assert sum(part.measured_s for part in alone.parts) == pytest.approx(alone.step_time_s)
  output().print(alone)
  assert "a loop whose length depends on the data (while.3)" in " ".join(capsys.readouterr().out.split())
  with pytest.raises(UserError, match="0 of the 6 steps of this run are left"):
    moejax.train(experiment, run.directory, profile=2)
