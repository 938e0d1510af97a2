"""Whole plans: of a tiny model on simulated devices, and in the slow suite on described TPUs."""

import gzip
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from moejax.config import Mesh
from moejax.config.parameters import flops_per_token, tokens_per_step
from moejax.display import Display
from moejax.errors import UserError
from moejax.experiments import EXPERIMENTS
from moejax.overrides import override
from moejax.planning.hints import hints
from moejax.planning.page import plan_html, verdict
from moejax.planning.plan import plan
from moejax.planning.topology import parse_topology

CPU = parse_topology("cpu:8")

KEYS = {
  "experiment", "topology", "devices", "mesh", "tokens_per_step", "parameters_total", "parameters_active",
  "model_flops_per_step", "executed_flops_per_device", "hbm_bytes_per_device", "hbm_limit_bytes", "fits",
  "step_time_s", "mfu", "breakdown_s", "collectives", "compile_time_s",
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
  assert "fits" in verdict(planned) and "most expensive operations" in plan_html(planned)


def test_the_flops_of_the_compiled_step_are_those_of_the_model(tiny_dense, display):
  """Without remat a step computes each product once forwards and twice backwards, scores above the diagonal too."""
  experiment = replace(tiny_dense, mesh=Mesh(data=8))
  found = plan(experiment, CPU, display)
  assert found.executed_flops_per_device * 8 == pytest.approx(found.model_flops_per_step, rel=0.02)


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
  assert hints(found)[0].startswith("--model.remat products")


def test_slices_that_the_replica_axis_does_not_span_are_refused(tiny_dense, display):
  with pytest.raises(UserError, match=r"mesh\.replica=1 does not span the 2 slices"):
    plan(replace(tiny_dense, mesh=Mesh(data=8)), parse_topology("cpu:4", slices=2), display)


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


needs_gpu_compiler = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda12_plugin") is None, reason="compiling for GPU needs pip install moejax[gpu-plan]"
)


@pytest.mark.slow
@needs_gpu_compiler
@pytest.mark.parametrize("gpu", ["a100", "h100", "h200", "b200"])
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
