"""A user's measurements become constants of a chip, and plans that use them have the measured times."""

import dataclasses
import json
import math
import random
from types import SimpleNamespace

import jax
import pytest

from moejax import cli
from moejax.config.chips import CHIPS
from moejax.errors import UserError
from moejax.planning import timed_operations
from moejax.planning.against import measured_step_s, record_step
from moejax.planning.calibrated_chip import Calibration, calibration_of, with_calibration
from moejax.planning.calibration import KINDS, LINK, Measurements, TimedOperation, TimedStep, add_operations, calibrated
from moejax.planning.collectives import Network, Place
from moejax.planning.compile import Compiled
from moejax.planning.plan import Plan, plan_of
from moejax.planning.topology import Topology, parse_topology
from moejax.training.run_directory import run_configuration

OPERATIONS = tuple(TimedOperation(name=kind, kind=kind, predicted_s=1.0, measured_s=2.0) for kind in KINDS)

V5P = parse_topology("v5p:2x2x1")

STEP = """HloModule m, is_scheduled=true

ENTRY %main (p: bf16[1048576], q: bf16[64,64]) -> bf16[4194304] {{
  %p = bf16[1048576]{{0}} parameter(0)
  %q = bf16[64,64]{{1,0}} parameter(1)
  %product = bf16[64,64]{{1,0}} dot(%q, %q), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, backend_config={{"estimated_cycles":"{product}"}}
  %vector = bf16[64,64]{{1,0}} negate(%product), backend_config={{"estimated_cycles":"{vector}"}}
  ROOT %gathered = bf16[4194304]{{0}} all-gather(%p), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, channel_id=1, use_global_device_ids=true
}}
"""  # noqa: E501


def compiled(experiment, topology: Topology, product: int = 10**9, vector: int = 10**8) -> Compiled:
  """A step with a product, a vector operation and an exposed collective."""
  places = tuple(Place((i % 2, i // 2, 0), 0) for i in range(4))
  network = Network(topology.chip, topology.torus, places, {"data": 4})
  text = STEP.format(product=product, vector=vector)
  return Compiled(experiment, network, text, {"total": 1}, 1.0, False)


def planned(experiment, topology: Topology, **cycles: int) -> Plan:
  return plan_of(compiled(experiment, topology, **cycles), topology)


def test_a_plan_that_is_calibrated_with_one_measured_step_has_its_time_whatever_the_operations_say(
  tiny_dense, tmp_path
):
  draw = random.Random(0)
  for case in range(20):
    file = tmp_path / f"{case}.json"
    if case % 2:
      operations = [
        TimedOperation(name=kind, kind=kind, predicted_s=1.0, measured_s=draw.uniform(1, 3)) for kind in KINDS
      ]
      add_operations(file, V5P.chip, tuple(operations), draw.uniform(0, 1e-3))
    before = planned(tiny_dense, calibrated(V5P, file, to_record=True))
    assert before.breakdown_s["collective_exposed"] > 0
    measured_s = before.step_time_s * draw.uniform(0.5, 3)
    found = record_step(before, measured_s, file)
    assert found.ratio == before.step_time_s / measured_s and str(file) in found.summary
    topology = calibrated(V5P, file)
    after = planned(tiny_dense, topology)
    assert after.step_time_s == pytest.approx(measured_s)
    assert sum(after.breakdown_s.values()) == pytest.approx(after.step_time_s)
    assert after.breakdown_s["collective_exposed"] == before.breakdown_s["collective_exposed"]
    assert after.to_json()["calibration"]["runs"] == 1
    # Measured again: in place of the first, so that the plan has the second time.
    record_step(after, 1.1 * measured_s, file)
    assert planned(tiny_dense, calibrated(V5P, file)).step_time_s == pytest.approx(1.1 * measured_s)
    assert planned(tiny_dense, calibrated(V5P, file), product=10**10).step_time_s > after.step_time_s


def test_the_efficiencies_of_operations_are_their_predicted_over_their_measured_times():
  draw = random.Random(1)
  true = {kind: draw.uniform(0.3, 1.5) for kind in KINDS}
  operations = []
  for kind in KINDS:
    for _ in range(3):
      seconds = draw.uniform(1e-4, 1e-1)
      operations.append(TimedOperation(name=kind, kind=kind, predicted_s=seconds, measured_s=seconds / true[kind]))
  found = Measurements(operations=tuple(operations), overhead_s=1e-4).calibration(V5P.chip)
  assert {kind: found.of(kind) for kind in KINDS} == pytest.approx(true)
  assert (found.of("vector"), found.of("kernel splash_mha")) == pytest.approx((true["memory"], true["kernel"]))
  assert found.overhead_s == 1e-4 and found.runs == 0
  # What was not measured has the mean of what was.
  matrix = Measurements(operations=tuple(operations[:3])).calibration(V5P.chip)
  assert matrix.kernel == matrix.memory == pytest.approx(true["matrix"])


def test_measured_links_change_the_bandwidth_of_the_chip_once_and_no_efficiency():
  link = TimedOperation(name="all-gather", kind=LINK, predicted_s=1.0, measured_s=4.0)
  found = Measurements(operations=(*OPERATIONS, link)).calibration(V5P.chip)
  assert (found.matrix, found.kernel, found.memory, found.link) == (0.5, 0.5, 0.5, 0.25)
  for steps in ((), (step(2.0),)):
    chip = V5P.chip
    for _ in range(2):
      chip = with_calibration(chip, Measurements(operations=(*OPERATIONS, link), steps=steps).calibration(V5P.chip))
      assert chip.link_bandwidth == V5P.chip.link_bandwidth / 4
  assert Measurements(operations=OPERATIONS).calibration(V5P.chip).link == 1.0


def test_an_overhead_that_leaves_a_measured_step_no_time_counts_in_part():
  short = step(0.06)
  found = Measurements(operations=OPERATIONS, overhead_s=1.0, steps=(short,)).calibration(V5P.chip)
  assert 0 < found.overhead_s < short.measured_s - short.exposed_s and found.matrix > 0


def test_a_device_that_plans_do_not_know_is_refused(monkeypatch):
  device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 PCIe")
  monkeypatch.setattr(timed_operations.jax, "devices", lambda: [device])
  with pytest.raises(UserError, match="'NVIDIA H100 PCIe' is not one that plans are made for"):
    timed_operations.local_chip()


def step(measured_s: float, **changes) -> TimedStep:
  values = {"experiment": "a", "topology": "v5p:2x2x1", "slices": 1, "mesh": {"data": 4}, "matrix_s": 0.6,
            "kernel_s": 0.1, "memory_s": 0.2, "exposed_s": 0.05, "predicted_s": 1.0,
            "measured_s": measured_s}  # fmt: skip
  return TimedStep(**values | changes)


def test_with_four_steps_the_interval_is_that_of_their_own_errors(tiny_dense):
  factors = (0.8, 0.9, 1.0, 1.15)
  steps = tuple(step(0.9 / factor + 0.05) for factor in factors)
  assert Measurements(steps=steps[:3]).calibration(V5P.chip).half_width is None
  found = Measurements(steps=steps).calibration(V5P.chip)
  logs = [math.log(factor) for factor in factors]
  errors = [log - (sum(logs) - log) / 3 for log in logs]
  assert found.half_width == pytest.approx(max(map(abs, errors))) and found.runs == 4
  chip = with_calibration(V5P.chip, found)
  plan = planned(tiny_dense, dataclasses.replace(V5P, chip=chip))
  low, high = plan.step_time_interval_s
  assert high / plan.step_time_s == pytest.approx(plan.step_time_s / low) == pytest.approx(math.exp(found.half_width))


def test_an_interval_is_no_narrower_where_only_operations_were_measured(tiny_dense):
  def width(**given) -> float:
    chip = with_calibration(V5P.chip, Calibration(matrix=1.0, kernel=1.0, memory=1.0, **given))
    low, high = planned(tiny_dense, dataclasses.replace(V5P, chip=chip)).step_time_interval_s
    return high / low

  assert width(runs=4, half_width=0.05) < width(runs=1) <= width()


@pytest.mark.parametrize("measured", ["0", "-1", "nan", "inf", "fast", ""])
def test_what_is_no_step_time_is_refused(measured, tiny_dense):
  with pytest.raises(UserError, match="--against"):
    measured_step_s(measured, tiny_dense, V5P)


def test_a_step_that_was_predicted_by_formula_is_compared_and_not_recorded(tiny_dense, tmp_path):
  refused = plan_of(dataclasses.replace(compiled(tiny_dense, V5P), text=""), V5P)
  found = record_step(refused, 1.0, tmp_path / "mine.json")
  assert found.recorded is None and "not recorded" in found.summary and not list(tmp_path.iterdir())


def test_a_time_without_room_for_computation_is_not_recorded(tiny_dense, tmp_path):
  plan = planned(tiny_dense, V5P)
  with pytest.raises(UserError, match="no time for computation"):
    record_step(plan, plan.breakdown_s["collective_exposed"] / 2, tmp_path / "mine.json")
  assert not (tmp_path / "mine.json").exists()


GOOD = {"format": 1, "chips": {"v5p": {"operations": [], "overhead_s": 0.0, "steps": [dataclasses.asdict(step(1.0))]}}}


@pytest.mark.parametrize(
  "content",
  [
    "", "[]", "{}", '{"format": 2, "chips": {}}', '{"format": 1}', json.dumps(GOOD).replace("v5p", "v9"),
    json.dumps(GOOD).replace('"measured_s": 1.0', '"measured_s": 0'),
    json.dumps(GOOD).replace('"measured_s": 1.0', '"measured_s": "1"'),
    json.dumps(GOOD).replace('"measured_s"', '"other_s"'), json.dumps({**GOOD, "chips": []}),
    json.dumps(GOOD).replace('"operations": []', '"operations": {}'.replace("{}", '["a"]')),
  ],
)  # fmt: skip
def test_a_damaged_file_is_named_in_one_line(content, tmp_path):
  file = tmp_path / "mine.json"
  file.write_text(json.dumps(GOOD))
  assert calibration_of(calibrated(V5P, file).chip).runs == 1
  file.write_text(content)
  with pytest.raises(UserError, match=r"mine\.json") as error:
    calibrated(V5P, file)
  assert "\n" not in str(error.value)


def test_a_file_without_the_chip_calibrates_others_alone_and_one_that_is_missing_none(tmp_path):
  file = tmp_path / "mine.json"
  with pytest.raises(UserError, match="moejax calibrate --out"):
    calibrated(V5P, file)
  assert calibrated(V5P, file, to_record=True) is V5P
  file.write_text(json.dumps(GOOD))
  with pytest.raises(UserError, match="no measurements of h100"):
    calibrated(parse_topology("gpu:h100:8"), file)


def test_a_run_gives_the_median_of_its_step_times_if_it_is_the_planned_one(tiny_dense, tmp_path):
  cpu = parse_topology("cpu:8")
  (tmp_path / "experiment.json").write_text(json.dumps(run_configuration(tiny_dense, 9)))
  summary = {"provenance": {"device_kind": "cpu", "device_count": 8}}
  (tmp_path / "summary.json").write_text(json.dumps(summary))
  lines = [{"step": n, "step_time_s": seconds} for n, seconds in enumerate((9.0, 0.2, 0.3, 0.25))]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 9}]))
  assert measured_step_s(str(tmp_path), tiny_dense, cpu) == 0.25
  larger = dataclasses.replace(tiny_dense, training=dataclasses.replace(tiny_dense.training, batch_size=64))
  for experiment, topology, reason in (
    (larger, cpu, "another batch size"),
    (tiny_dense, parse_topology("cpu:4"), "8 devices of the kind cpu"),
    (tiny_dense, parse_topology("gpu:h100:8"), "8 of h100"),
  ):
    with pytest.raises(UserError, match=reason):
      measured_step_s(str(tmp_path), experiment, topology)


def test_the_commands_record_and_use_measurements(mine, tmp_path, monkeypatch, capsys):
  def run(*words: str) -> tuple[int, str, dict]:
    with pytest.raises(SystemExit) as stopped:
      cli.main(["plan", f"{mine}:dense", "--topology", "v5p:2x2x1", "--json", str(tmp_path / "plan.json"), *words])
    out, err = capsys.readouterr()
    return stopped.value.code, out + err, json.loads((tmp_path / "plan.json").read_text())

  monkeypatch.setattr("moejax.planning.compile.compile_step", lambda of, topology, _, **__: compiled(of, topology))
  file = str(tmp_path / "mine.json")
  code, text, found = run("--calibration", file, "--against", "7.5")
  assert code == 0 and "measured: 7.5 s" in text and found["against"]["recorded"] == file
  code, text, found = run("--calibration", file)
  assert code == 0 and found["step_time_s"] == pytest.approx(7.5) and found["against"] is None
  assert "from 1 measured step on v5p in the calibration file" in " ".join(text.split())
  code, text, found = run("--precision", "int8", "bfloat16", "--offload", "moments")
  assert code == 0 and [one["speedup"] for one in found["precisions"]] == [1.0, 1.0]  # its product is in no scope
  assert found["offload"]["what"] == ["moments"] and "with moments on the host" in text
  code, text, found = run("--against", "7.5")
  assert code == 0 and found["against"]["recorded"] is None and found["calibration"] is None
  for words, reason in (
    (["--calibration", str(tmp_path / "none.json")], "none.json: No such file"),
    (["--against", "fast"], "--against fast is neither a number of seconds"),
    (["--search", "--against", "1"], "--against requires the plan of a single experiment"),
    (["--precision", "fp8"], "--precision fp8: the matrix units of v5p have bfloat16, int8"),
    (["--offload", "weights"], "--offload weights: activations and moments can move"),
  ):
    code, text, _ = run(*words)
    assert code == 2 and reason in text and text.count("\n") == 1


@pytest.mark.slow
def test_operations_are_measured_on_this_machine_and_calibrate_its_chip(tmp_path):
  chip = timed_operations.local_chip()
  assert chip is CHIPS["cpu"]
  operations, overhead_s = timed_operations.time_operations(chip)
  collectives = {"all-gather", "all-reduce", "all-to-all"} if len(jax.devices()) > 1 else set()
  assert {one.name.partition(" ")[0] for one in operations} >= {"product", "copy", "attention", *collectives}
  assert {one.name.partition(" ")[0] for one in operations if one.kind == LINK} == collectives
  found = add_operations(tmp_path / "mine.json", chip, operations, overhead_s)
  assert calibration_of(calibrated(parse_topology("cpu:1"), tmp_path / "mine.json").chip) == found.calibration
  times = {one.name: one.measured_s for one in operations if one.name.startswith("product")}
  assert sorted(times.values()) == list(times.values()) and 0 < overhead_s < 0.05
