"""Copies to and from the host: their bytes, and the time that a device waits for them."""

import dataclasses
import importlib.util
import io
import json
import pathlib
import subprocess
import sys

import pytest
from planning_programs import network_of
from rich.console import Console

from moejax.config import AdamW, Data, Evaluation, Experiment, Mesh, Model, Training
from moejax.config.chips import CHIPS, GIB
from moejax.planning.compile import Compiled, with_moments_on_host
from moejax.planning.cost import cost
from moejax.planning.estimate import estimate
from moejax.planning.host_copies import HOST_BANDWIDTH
from moejax.planning.page import plan_page
from moejax.planning.plan import plan, plan_of
from moejax.planning.program import parse
from moejax.planning.topology import parse_topology

CHIP = dataclasses.replace(CHIPS["v5p"], efficiency=1.0)
NETWORK = dataclasses.replace(network_of("v5p", (2, 2, 1)), chip=CHIP)
SIZE = 4 * 2**20
"""Bytes of each copy."""

COPIES = {
  "to the host": (
    "%out = (f32[1048576]{0:S(5)}, f32[1048576]{0}, u32[]{:S(2)}) copy-start(%device)",
    "%out.done = f32[1048576]{0:S(5)} copy-done(%out)",
  ),
  "from the host": (
    "%in = (f32[1048576]{0}, f32[1048576]{0:S(5)}, u32[]{:S(2)}) copy-start(%host)",
    "%in.done = f32[1048576]{0} copy-done(%in)",
  ),
  "of a slice to the host": (
    "%put = ((f32[8,1048576]{1,0:S(5)}, f32[1,1048576]{1,0}, s32[], s32[]), f32[8,1048576]{1,0:S(5)}, u32[]{:S(2)}) "
    "dynamic-update-slice-start(%layers, %row, %zero, %zero)",
    "%put.done = f32[8,1048576]{1,0:S(5)} dynamic-update-slice-done(%put)",
  ),
  "in a fusion": (
    "%fused = ((f32[8,1048576]{1,0:S(5)}, s32[]), f32[1,1048576]{1,0}, u32[]) fusion-start(%layers, %zero), "
    "kind=kCustom, calls=%wrapped",
    "%fused.done = f32[1,1048576]{1,0} fusion-done(%fused)",
  ),
  "of a slice from the host": (
    "%get = ((f32[8,1048576]{1,0:S(5)}, s32[], s32[]), f32[1,1048576]{1,0}, u32[]{:S(2)}) "
    "dynamic-slice-start(%layers, %zero, %zero), dynamic_slice_sizes={1,1048576}",
    "%get.done = f32[1,1048576]{1,0} dynamic-slice-done(%get)",
  ),
}
"""How each copy begins and ends, as libtpu writes it, and in a fusion, as XLA for GPU does."""


def priced(*lines: str, cycles: int = 0):
  """The cost of these lines; `WORK` stands for an operation of so many cycles."""
  work = '%work = f32[128]{0} negate(%small), backend_config={"window_config":{"estimated_cycles":"CYCLES"}}'
  body = "\n".join(f"  {line}" for line in lines).replace("WORK", work).replace("CYCLES", str(cycles))
  text = f"""HloModule m, is_scheduled=true

%wrapped (a: f32[8,1048576], b: s32[]) -> f32[1,1048576] {{
  %all = f32[8,1048576]{{1,0:S(5)}} parameter(0)
  %at = s32[] parameter(1)
  ROOT %slice = f32[1,1048576]{{1,0}} dynamic-slice(%all, %at, %at), dynamic_slice_sizes={{1,1048576}}
}}

ENTRY %main (a: f32[1048576], b: f32[1048576], c: f32[8,1048576], d: f32[1,1048576], e: f32[128]) -> f32[128] {{
  %device = f32[1048576]{{0}} parameter(0)
  %host = f32[1048576]{{0:S(5)}} parameter(1)
  %layers = f32[8,1048576]{{1,0:S(5)}} parameter(2)
  %row = f32[1,1048576]{{1,0}} parameter(3)
  %small = f32[128]{{0}} parameter(4)
  %zero = s32[] constant(0)
{body}
  ROOT %end = f32[128]{{0}} bitcast(%small)
}}
"""
  return cost(parse(text), NETWORK)


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("busy", [0.0, 0.5, 2.0])
def test_the_device_waits_for_the_part_of_a_copy_that_no_work_hides(kind, busy):
  start, done = COPIES[kind]
  alone_s = SIZE / HOST_BANDWIDTH["v5p"]
  found = priced(start, "WORK", done, cycles=round(busy * alone_s * CHIP.clock_hz))
  assert (found.host.bytes, found.host.time_s) == (SIZE, pytest.approx(alone_s))
  assert found.host.exposed_s == pytest.approx(max(0.0, 1 - busy) * alone_s, rel=1e-3, abs=1e-9)
  assert found.breakdown_s["host_exposed"] == found.host.exposed_s
  assert found.breakdown_s["memory"] == 0
  assert found.step_time_s == pytest.approx(max(1.0, busy) * alone_s, rel=1e-3)


@pytest.mark.parametrize(
  ("kinds", "times"),
  [
    (("to the host", "from the host"), 1),
    (("of a slice to the host", "from the host"), 1),
    (("to the host", "of a slice to the host"), 2),
    (("from the host", "of a slice from the host"), 2),
  ],
)
def test_copies_in_one_direction_wait_for_each_other_and_opposite_ones_do_not(kinds, times):
  starts, ends = zip(*(COPIES[kind] for kind in kinds), strict=True)
  found = priced(*starts, *ends)
  assert found.host.bytes == 2 * SIZE
  assert found.step_time_s == pytest.approx(times * SIZE / HOST_BANDWIDTH["v5p"])


def test_a_copy_that_is_not_asynchronous_is_waited_for_and_one_within_the_device_is_none():
  waited = priced("%now = f32[1048576]{0:S(5)} copy(%device)", "WORK", cycles=10**6)
  assert waited.host.exposed_s == pytest.approx(SIZE / HOST_BANDWIDTH["v5p"])
  assert priced("%same = f32[1048576]{0} copy(%device)").host.bytes == 0


DENSE = Experiment(
  name="dense",
  model=Model(
    num_layers=4, d_model=256, num_heads=2, num_kv_heads=2, head_dim=128, d_ff=1024, vocab_size=512, remat="attention"
  ),
  data=Data(sequence_length=256),
  training=Training(batch_size=16),
  optimizer=AdamW(learning_rate=1e-3),
  evaluation=Evaluation(batch_size=16),
  mesh=Mesh(data=4),
)  # fmt: skip
OFFLOADING = dataclasses.replace(
  DENSE,
  model=dataclasses.replace(DENSE.model, offload_activations=("attention", "layer_inputs")),
  optimizer=dataclasses.replace(DENSE.optimizer, offload_moments=True),
)


def test_the_formula_takes_what_is_offloaded_from_the_device_and_adds_the_time_of_its_copies():
  topology = parse_topology("v5e:2x2")
  before, after = estimate(DENSE, topology), estimate(OFFLOADING, topology)
  assert after.memory_by_group["moments"] == 0 < before.memory_by_group["moments"]
  # Two of four layers stay: that which is moved and that which is computed.
  freed = before.memory_by_group["activations"] - after.memory_by_group["activations"]
  assert freed == pytest.approx(before.saved_activations / 2)
  moments_s = before.memory_by_group["moments"] / HOST_BANDWIDTH["v5e"]
  assert after.step_time_s >= before.step_time_s + moments_s
  on_cpu = parse_topology("cpu:4")
  assert estimate(OFFLOADING, on_cpu).step_time_s == estimate(DENSE, on_cpu).step_time_s


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install moejax[tpu]")
def test_a_program_for_tpu_has_what_is_offloaded_on_the_host_and_copies_it(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  before, after = (plan(each, parse_topology("v5e:2x2")) for each in (DENSE, OFFLOADING))
  moments = before.memory_by_group["moments"]
  assert before.host.bytes == 0 and "host" not in before.memory_bytes
  assert before.memory_bytes["arguments"] - after.memory_bytes["arguments"] == pytest.approx(moments, rel=0.05)
  assert after.memory_bytes["host"] > moments and after.host.bytes > 2 * moments
  assert after.hbm_bytes_per_device < before.hbm_bytes_per_device
  on_device = sum(after.memory_bytes[what] for what in ("arguments", "temporaries", "code"))
  assert after.hbm_bytes_per_device <= on_device, "activations on the host take no memory of the device"
  assert 0 < after.host.exposed_s <= after.host.time_s
  assert after.to_json()["host"]["bytes"] == after.host.bytes and plan_page(after)


PRODUCT = """HloModule m, is_scheduled=true

ENTRY %main (p: bf16[4096,4096]) -> bf16[4096,4096] {
  %p = bf16[4096,4096]{1,0} parameter(0)
  ROOT %q = bf16[4096,4096]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
ON_GPU = parse_topology("gpu:h100:4")
MOMENTS = dataclasses.replace(
  DENSE, optimizer=dataclasses.replace(DENSE.optimizer, offload_moments=True), mesh=Mesh(data=4)
)


def test_the_plan_of_a_program_for_gpu_has_moments_on_the_host_by_formula():
  on_device = Compiled(
    dataclasses.replace(MOMENTS, optimizer=DENSE.optimizer), dataclasses.replace(NETWORK, chip=ON_GPU.chip), PRODUCT,
    {"arguments": 9 * GIB, "temporaries": 4 * GIB, "output": 8 * GIB, "code": 0, "total": 13 * GIB}, 1.0, cached=False,
  )  # fmt: skip
  on_host = with_moments_on_host(dataclasses.replace(on_device, experiment=MOMENTS), 6 * GIB)
  before, after = plan_of(on_device, ON_GPU), plan_of(on_host, ON_GPU)
  assert after.memory_bytes == {
    "arguments": 3 * GIB, "temporaries": 4 * GIB, "output": 2 * GIB, "code": 0, "total": 7 * GIB, "host": 6 * GIB,
  }  # fmt: skip
  moments_s = 6 * GIB / HOST_BANDWIDTH["h100"]
  assert (after.host.bytes, after.host.time_s, after.host.exposed_s) == (12 * GIB, 2 * moments_s, moments_s)
  assert after.step_time_s - before.step_time_s == pytest.approx(moments_s) == after.breakdown_s["host_exposed"]
  assert after.to_json()["moments_by_formula"] and not before.to_json()["moments_by_formula"]
  shown = Console(file=io.StringIO(), width=200)
  shown.print(plan_page(after))
  assert "moments by formula" in shown.file.getvalue()


OF_GPU = """
import json, sys
sys.path.insert(0, sys.argv[1])
from moejax.planning.topology import prepare_environment
from test_host_copies import DENSE, MOMENTS, ON_GPU

prepare_environment(ON_GPU)
from moejax.planning.plan import plan

print(json.dumps([plan(each, ON_GPU).to_json() for each in (DENSE, MOMENTS)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda12_plugin") is None, reason="compiling for GPU needs pip install moejax[gpu-plan]"
)
def test_moments_on_the_host_leave_the_memory_of_a_gpu(tmp_path, monkeypatch):
  """In another process, as XLA's flags of this one name devices of CPU."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  folder = str(pathlib.Path(__file__).parent)
  done = subprocess.run([sys.executable, "-c", OF_GPU, folder], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  before, after = json.loads(done.stdout)
  moments = before["memory_by_group"]["moments"]
  assert before["hbm_bytes_per_device"] - after["hbm_bytes_per_device"] == pytest.approx(moments, rel=0.05)
  assert after["memory_bytes"]["host"] == pytest.approx(moments, rel=0.05)
  assert after["host"]["bytes"] == 2 * after["memory_bytes"]["host"]
  assert after["step_time_s"] - before["step_time_s"] == pytest.approx(after["host"]["exposed_s"])
