"""Whole plans: of a tiny model on simulated devices, and in the slow suite on described TPUs."""

import gzip
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from planning_programs import PROGRAMS
from rich.console import Console

from moejax.config import GroupedQuery, Mesh
from moejax.config.chips import CHIPS
from moejax.config.parameters import flops_per_token, tokens_per_step
from moejax.display import Display
from moejax.experiments import EXPERIMENTS
from moejax.kernels.attention import fused_attention
from moejax.overrides import override
from moejax.planning.compile import Compiled, _shortage
from moejax.planning.cost import BREAKDOWN
from moejax.planning.devices import describe_devices
from moejax.planning.estimate import estimate
from moejax.planning.hints import hints
from moejax.planning.meshes import on_topology
from moejax.planning.page import as_html, plan_page, verdict
from moejax.planning.plan import PlannedCollective, PlannedOperation, plan, plan_of
from moejax.planning.topology import parse_topology
from moejax.training.compiler import compiler_options
from moejax.training.memory import counted_memory

CPU = parse_topology("cpu:8")

KEYS = {
  "experiment", "topology", "devices", "mesh", "tokens_per_step", "parameters_total", "parameters_active",
  "model_flops_per_step", "executed_flops_per_device", "hbm_bytes_per_device", "hbm_limit_bytes", "fits",
  "step_time_s", "step_time_interval_s", "mfu", "breakdown_s", "collectives", "compile_time_s",
}  # fmt: skip
"""What scripts may rely on."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """Programs are remembered here."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  return tmp_path


@pytest.fixture
def display():
  with Display("plan") as shown:
    yield shown


def test_the_formula_counts_the_keys_and_values_that_context_parallelism_gathers(tiny_dense):
  gathering, whole = (replace(tiny_dense, mesh=mesh) for mesh in (Mesh(data=2, context=4), Mesh(data=8)))
  assert estimate(gathering, CPU).step_time_s > estimate(whole, CPU).step_time_s


def test_the_formula_counts_fewer_of_them_where_a_window_needs_those_of_one_part_alone(tiny_dense):
  def received_s(window):
    model = replace(tiny_dense.model, attention=(GroupedQuery(window=window),))
    meshes = Mesh(data=2, context=4), Mesh(data=8)
    gathering_s, whole_s = (estimate(replace(tiny_dense, model=model, mesh=of), CPU).step_time_s for of in meshes)
    return gathering_s - whole_s

  assert 0 < received_s(9) < received_s(10) == pytest.approx(received_s(None))  # a part has 8 positions


def test_a_plan_has_the_promised_keys_and_adds_up_and_is_remembered(tiny_moe, display):
  experiment = replace(tiny_moe, mesh=Mesh(data=4, expert=2))
  planned = plan(experiment, CPU, display)
  found = planned.to_json()
  assert found.keys() >= KEYS
  assert found["model_flops_per_step"] == tokens_per_step(experiment) * flops_per_token(experiment.model, 32)
  assert found["fits"] and found["hbm_bytes_per_device"] < found["hbm_limit_bytes"]
  assert sum(found["breakdown_s"].values()) == pytest.approx(found["step_time_s"])
  assert {moved["axis"] for moved in found["collectives"]} >= {"data", "expert"}
  assert any(moved["kind"] == "all-to-all" and moved["axis"] == "expert" for moved in found["collectives"])
  again = plan(experiment, CPU, display)
  assert again.cached and not planned.cached
  assert replace(again, cached=False) == planned
  (facts,) = (pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "moejax" / "plans").rglob("facts.json")
  content = facts.read_text()
  facts.write_text(content.replace("1", "2", 1))
  repeated = plan(experiment, CPU, display)
  assert not repeated.cached and repeated.hbm_bytes_per_device == planned.hbm_bytes_per_device
  assert "fits" in verdict(planned) and "most expensive operations" in as_html("tiny", plan_page(planned))


def test_the_flops_of_the_compiled_step_are_those_of_the_model(tiny_dense, display):
  """Without remat a step computes each product once forwards and twice backwards, scores above the diagonal too."""
  experiment = replace(tiny_dense, mesh=Mesh(data=8))
  found = plan(experiment, CPU, display)
  assert found.executed_flops_per_device * 8 == pytest.approx(found.model_flops_per_step, rel=0.02)


@pytest.mark.slow
def test_step_time_and_memory_grow_with_batch_layers_and_experts(tiny_moe, display):
  experiment = replace(tiny_moe, mesh=Mesh(data=2, expert=4))
  small = plan(experiment, CPU, display)
  for options in (["--training.batch-size", "32"], ["--model.num-layers", "4"], ["--model.moe.num-experts", "16"]):
    large = plan(override(experiment, options), CPU, display)
    assert large.step_time_s > small.step_time_s, options
    assert large.hbm_bytes_per_device > small.hbm_bytes_per_device, options


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_to_try(tiny_dense, display):
  found = plan(replace(tiny_dense, mesh=Mesh(data=8)), CPU, display)
  small = replace(CPU, chip=replace(CPU.chip, hbm_bytes=found.hbm_bytes_per_device // 2))
  found = replace(found, topology=small)
  assert not found.fits and "too much" in verdict(found)
  assert hints(found)


def test_a_program_that_the_compiler_refuses_is_answered_by_formula(tiny_moe):
  """Time with a wide interval, what takes the memory, and the nearest change that fits."""
  experiment = replace(tiny_moe, mesh=Mesh(data=4, expert=2))
  found = plan_of(Compiled(experiment, None, "", {"total": 5 * 2**30}, 1.0, False), CPU)
  assert found.refused and not found.fits
  assert found.step_time_s == estimate(experiment, CPU).step_time_s > 0
  low, high = found.step_time_interval_s
  assert low < found.step_time_s / 1.5 and high > found.step_time_s * 1.5
  values = found.to_json()
  assert values["step_time_source"] == "formula" and values["tokens_per_s"] > 0
  assert set(values["memory_by_group"]) >= {
    "parameters",
    "gradients",
    "moments",
    "activations",
    "exchange_buffers",
    "logits",
  }
  console = Console(width=80, file=io.StringIO())
  console.print(plan_page(found))
  text = console.file.getvalue()
  assert "memory by formula" in text and "try:" in text


def test_a_program_that_does_not_fit_is_compiled_if_that_is_asked_for(tiny_dense, monkeypatch):
  """As for a plan with offload: it is priced and does not fit."""
  text = (PROGRAMS / "product.txt").read_text()

  def compiled(_, options):
    accepted = "xla_tpu_no_crash_on_oom" in options
    return (text if accepted else ""), {"total": 2**40}, 1.0

  monkeypatch.setattr("moejax.planning.compile._compiled", compiled)
  experiment = replace(tiny_dense, mesh=Mesh(data=8))
  assert plan(experiment, CPU).refused
  for _ in range(2):  # the second time from the cache
    found = plan(experiment, CPU, beyond_memory=True)
    assert not found.refused and not found.fits and found.to_json()["step_time_source"] == "program"


@pytest.mark.slow
def test_the_nearest_change_that_fits_fits_by_the_corrected_formula_and_changes_the_fewest_options():
  experiment = on_topology(EXPERIMENTS["moe_6b4_64e"](), parse_topology("v6e:16x16"))
  topology = parse_topology("v6e:16x16")
  found = plan_of(Compiled(experiment, None, "", {"total": 60 * 2**30}, 1.0, False), topology)
  first = hints(found)[0]
  changed = override(experiment, first.partition(":")[0].split())
  correction = 60 * 2**30 / estimate(experiment, topology).memory_bytes
  assert correction * estimate(changed, topology).memory_bytes <= topology.chip.hbm_bytes
  assert changed.model.moe == experiment.model.moe
  assert first.partition(":")[0].count("--") <= 2


def test_libtpu_takes_a_program_where_its_own_count_is_below_its_limit():
  """Facts of programs just below and just above the limit of each chip (write_memory.py)."""
  for chip, facts in json.loads((PROGRAMS / "memory.json").read_text()).items():
    limit = CHIPS[chip].hbm_bytes
    taken = [counted_memory(SimpleNamespace(**fact), "tpu").total for fact in facts if "refused" not in fact]
    refused = [_shortage(fact["refused"])["total"] for fact in facts if "refused" in fact]
    assert 0.93 * limit < max(taken) <= limit, chip
    assert 0.999 * limit < min(refused) < 1.03 * limit, chip


def test_what_a_program_keeps_on_the_host_takes_no_memory_of_the_device():
  """Statistics of the step of Llama 3.1 8B on v6e:2x4 with the saved activations offloaded, which libtpu compiles: its
  peak, of which 27.1 GiB are on the host, is above the limit."""
  fact = SimpleNamespace(
    argument_size_in_bytes=12046048768, temp_size_in_bytes=19522292576, output_size_in_bytes=12045397184,
    alias_size_in_bytes=12045397184, generated_code_size_in_bytes=101696512, host_argument_size_in_bytes=0,
    host_temp_size_in_bytes=29091692544, peak_memory_in_bytes=41137768128,
  )  # fmt: skip
  limit = CHIPS["v6e"].hbm_bytes
  assert fact.peak_memory_in_bytes > limit > counted_memory(fact, "tpu").total > 0.9 * limit
  fact.host_temp_size_in_bytes = 0
  assert counted_memory(fact, "tpu").total > limit


def test_mfu_counts_neither_dropped_choices_nor_padding(tiny_moe):
  """A capacity of half the balanced load accepts half of the choices; twice the balanced load is padding."""

  def flops(capacity_factor: float) -> float:
    moe = replace(tiny_moe.model.moe, capacity_factor=capacity_factor)
    return plan_of(
      Compiled(replace(tiny_moe, model=replace(tiny_moe.model, moe=moe)), None, "", {"total": 1}, 1.0, False), CPU
    ).model_flops_per_step

  model, moe = tiny_moe.model, tiny_moe.model.moe
  expert = 6 * model.num_sparse_layers * model.feed_forward_matrices * model.d_model * moe.d_ff
  choices = expert * moe.experts_per_token * tokens_per_step(tiny_moe)
  assert flops(1.0) == flops(2.0) == tokens_per_step(tiny_moe) * flops_per_token(model, 32)
  assert flops(1.0) - flops(0.5) == pytest.approx(choices / 2)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_page_breaks_no_name_however_narrow(width, tiny_moe):
  moved = PlannedCollective(
    axis="data+expert", kind="ragged-all-to-all", scope="shared_experts", devices=8, count=1, bytes=2.0**40,
    bandwidth_bytes_per_s=9e10, time_s=12.0, exposed_s=11.0,
  )  # fmt: skip
  operation = PlannedOperation(
    scope="attention_router", of_pass="recompute", kind="kernel splash_mha_dkv", time_s=12.0, fraction=0.9, flops=1e15,
    count=96,
  )  # fmt: skip
  planned = replace(
    plan_of(Compiled(tiny_moe, None, "", {"total": 1}, 1.0, False), CPU),
    breakdown_s=dict.fromkeys(BREAKDOWN, 3.0),
    executed_flops_per_device=1e15,
    kernel_s=1.0,
    operations=(operation,),
    collectives=(moved,),
  )
  console = Console(width=width, file=io.StringIO())
  console.print(plan_page(planned), soft_wrap=True)
  text = console.file.getvalue()
  for name in ("data+expert", "ragged-all-to-all", "shared_experts", "attention_router", "kernel splash_mha_dkv"):
    assert name in text
  assert max(len(line) for line in text.splitlines() if not line.startswith("try:")) <= width


needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs pip install moejax[tpu]"
)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_options_of_every_chip_are_ones_that_its_compiler_takes(topology, tiny_moe, display):
  """A step that gathers weights over one axis and exchanges tokens over another."""
  described = parse_topology(topology)
  mesh = Mesh(data=described.devices // 2, expert=2)
  found = plan(replace(tiny_moe, mesh=mesh), described, display)
  assert found.fits
  assert {"all-gather", "all-to-all"} <= {moved.kind for moved in found.collectives}


@pytest.mark.slow
@needs_libtpu
def test_a_gather_over_a_whole_slice_stays_a_gather_and_wide_heads_fit_in_vmem():
  """By default, libtpu makes an all-reduce of the gather, which is twice the bytes."""
  devices = describe_devices(parse_topology("v4:4x4x4"))
  mesh = jax.sharding.Mesh(np.array(devices), ("data",))
  sharded = NamedSharding(mesh, PartitionSpec("data"))
  w = jax.ShapeDtypeStruct((8192, 1024), jnp.bfloat16, sharding=sharded)
  x = jax.ShapeDtypeStruct((65_536, 8192), jnp.bfloat16, sharding=sharded)
  lowered = jax.jit(jnp.matmul, out_shardings=sharded).lower(x, w)
  text = lowered.compile(compiler_options=compiler_options(devices[0])).as_text()
  assert "all-gather" in text and "all-reduce" not in text

  def gradients(q, k, v, segments):
    return jax.grad(lambda *of: fused_attention(*of, segments).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

  q = jax.ShapeDtypeStruct((64, 2048, 2, 256), jnp.bfloat16, sharding=sharded)
  segments = jax.ShapeDtypeStruct((64, 2048), jnp.int32, sharding=sharded)
  specs = {"in_specs": PartitionSpec("data"), "out_specs": PartitionSpec("data"), "check_vma": False}
  shared = jax.jit(jax.shard_map(gradients, mesh=mesh, **specs))
  assert shared.lower(q, q, q, segments).compile(compiler_options=compiler_options(devices[0]))


@pytest.mark.slow
@needs_libtpu
def test_parts_of_sequences_have_the_fused_kernel_whose_scores_are_not_in_memory(tiny_dense, display):
  length = 4096
  model = replace(tiny_dense.model, attention=(GroupedQuery(sinks=True),))
  data, mesh = replace(tiny_dense.data, sequence_length=length), Mesh(data=1, context=4)
  experiment = replace(tiny_dense, model=model, data=data, mesh=mesh)
  found = plan(experiment, parse_topology("v5p:2x2x1"), display)
  kernels = {operation.kind: operation for operation in found.operations if "splash" in operation.kind}
  assert set(kernels) == {f"kernel splash_mha_{name}" for name in ("fwd", "dq", "dkv")}
  rows, heads, layers = experiment.training.batch_size, experiment.model.num_heads, experiment.model.num_layers
  blocks, block = length // 512, 512  # two halves of 512 positions, which together see as many blocks on every device
  scores = rows * heads * layers * (blocks + 1) * block**2
  assert kernels["kernel splash_mha_dkv"].flops == 2 * 4 * scores * experiment.model.head_dim
  assert {"all-gather", "collective-permute"} <= {moved.kind for moved in found.collectives}
  of_scores = f",{length // 4},{length}]"
  assert not [array for array in found.largest_arrays if array.shape.endswith(of_scores)]


needs_gpu_compiler = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda12_plugin") is None, reason="compiling for GPU needs pip install moejax[gpu-plan]"
)


@needs_gpu_compiler
@pytest.mark.parametrize(
  "gpu", [*(pytest.param(gpu, marks=pytest.mark.slow) for gpu in ("a100", "b200")),
          *(pytest.param(gpu, marks=pytest.mark.nightly) for gpu in ("h100", "h200", "gb200"))]
)  # fmt: skip
def test_a_sparse_step_compiles_for_every_gpu_in_bfloat16(gpu, mine, cache):
  """In another process, as XLA's flags of this one name devices of CPU."""
  path = cache / "plan.json"
  words = [f"{mine}:sparse", "--topology", f"gpu:{gpu}:16", "--mesh.expert", "2"]
  fields = ["--training.batch-size", "16", "--evaluation.batch-size", "16", "--json", str(path)]
  done = subprocess.run([sys.executable, "-m", "moejax", "plan", *words, *fields], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = json.loads(path.read_text())
  assert {("all-to-all", "expert"), ("all-gather", "data")} <= {
    (moved["kind"], part) for moved in found["collectives"] for part in moved["axis"].split("+")
  }
  # One forward and two backward products, no more: what recomputes or masks is small beside them here.
  assert found["executed_flops_per_device"] * 16 == pytest.approx(found["model_flops_per_step"], rel=0.5)
  (program,) = (cache / "moejax" / "plans").glob("*/program.txt.gz")
  assert "bf16[" in gzip.decompress(program.read_bytes()).decode()


FUSED_AND_PLAIN = """
import json
from unittest import mock
from moejax.experiments import EXPERIMENTS
from moejax.overrides import override
from moejax.planning.topology import parse_topology, prepare_environment

topology = parse_topology("gpu:h100:8")
prepare_environment(topology)
from moejax.kernels.attention import attention
from moejax.models import attend
from moejax.planning.plan import plan

fields = "--model.num-layers 2 --mesh.replica 1 --mesh.data 8 --training.batch-size 8 --evaluation.batch-size 8"
experiment = override(EXPERIMENTS["fuji_7b_v2"](), fields.split())
fused = plan(experiment, topology)
with mock.patch.object(attend, "attention_for", lambda *_: attention):
  plain = plan(experiment, topology)
operations = [operation.to_json() for operation in fused.operations]
print(json.dumps([fused.to_json() | {"operations": operations}, plain.to_json()]))
"""


@pytest.mark.slow
@needs_gpu_compiler
def test_fused_attention_on_gpu_needs_no_memory_for_scores_runs_forward_once_and_skips_half_of_its_products(cache):
  done = subprocess.run([sys.executable, "-c", FUSED_AND_PLAIN], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  fused, plain = json.loads(done.stdout)
  scores = 4 * 32 * 4096 * 4096  # of one layer and sequence in float32
  assert plain["hbm_bytes_per_device"] - fused["hbm_bytes_per_device"] > scores
  kernels = {
    (found["kind"], found["pass"]): found for found in fused["operations"] if found["kind"].startswith("kernel")
  }
  assert {key: found["count"] for key, found in kernels.items()} == {
    ("kernel attention_fwd", "forward"): 2, ("kernel attention_dq", "backward"): 2,
    ("kernel attention_dkv", "backward"): 2,
  }  # fmt: skip
  computed = sum(found["flops"] for found in kernels.values())
  of_product = 2 * 2 * 32 * 128 * 4096 * 4096  # over all scores of 2 layers
  assert computed == pytest.approx((2 + 3 + 4) * of_product / 2, rel=0.01)
  assert fused["executed_flops_per_device"] < plain["executed_flops_per_device"]
  assert fused["mfu"] > plain["mfu"]


@pytest.mark.nightly
@needs_libtpu
def test_fuji_7b_on_256_v5p_takes_about_the_published_step_time(display):
  """One of the two runs that v5p is calibrated on (docs/step-time.md), which differ by a sixth."""
  found = plan(EXPERIMENTS["fuji_7b_v1"](), parse_topology("v5p:4x8x8"), display)
  assert found.fits
  assert found.step_time_s == pytest.approx(2.85, rel=0.1)
  assert found.compile_time_s < 300


@pytest.mark.nightly
@needs_libtpu
def test_mixtral_exchanges_tokens_over_the_expert_axis_and_gathers_no_expert(display):
  found = plan(EXPERIMENTS["mixtral_8x7b"](), parse_topology("v5p:4x8x8"), display)
  of_experts = [moved for moved in found.collectives if moved.scope in ("dispatch", "combine", "experts")]
  assert {moved.kind for moved in of_experts if "expert" in moved.axis} == {"all-to-all"}
  assert found.step_time_s - found.breakdown_s["collective_exposed"] < 1.35
