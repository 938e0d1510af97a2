"""Eight simulated devices for every test, strict ranks, three tiny experiments, and which tests are smoke tests."""

import gc
import os
import pathlib
import re
import tempfile
from dataclasses import replace
from importlib import metadata

import pytest

from moejax.config import AdamW, Data, Evaluation, Experiment, Losses, Model, MoE, Pair, Suite, Training

JAX = tuple(map(int, metadata.version("jax").split(".")[:2]))

# JAX reads these when it is imported, which nothing has done yet. The rank of two operands must agree, or be written.
# Programs of tests are tiny: compiling them is what takes the time, so it is done with little optimization.
FLAGS = (
  "--xla_force_host_platform_device_count=8",
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_parallel_codegen_split_count=1",
  # Eight devices share the cores of a busy machine: one may be late, and after 40 seconds XLA would abort the process.
  "--xla_cpu_collective_call_terminate_timeout_seconds=600",
  # The newer emitters take twice as long to compile. JAX 0.12 has no others, and there the flag is an error.
  *(["--xla_cpu_use_fusion_emitters=false"] if JAX < (0, 11) else []),
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# A program is compiled once for all workers of this run and for the commands that they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  CACHE = tempfile.TemporaryDirectory(prefix="moejax-tests-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# Compiled programs and traces stay in caches: millions of objects, through which no garbage collection should go again.
gc.set_threshold(200_000, 20, 20)

SMOKE = (
  "config/",
  "data/test_baselines.py",
  "data/test_best_fit.py",
  "data/test_corpus.py",
  "data/test_documents.py",
  "data/test_packing.py",
  "data/test_pipeline.py::test_every_epoch",
  "data/test_ratio_estimate.py",
  "data/test_sources.py",
  "data/test_token_stream.py",
  "test_architecture.py",
  "test_cli.py::test_a_mistake",
  "test_cli.py::test_lists_pages",
  "test_cli.py::test_show",
  "test_describe.py",
  "test_display.py",
  "test_experiments.py",
  "test_lookup.py",
  "test_overrides.py",
  "test_partitioning.py",
  "test_torus.py",
  "kernels/test_grouped_matmul.py::test_product_and_gradients_equal_a_loop_over_experts[uneven-cpu-float32]",
  "models/moe/test_dispatch.py",
  "models/moe/test_exchange.py",
  "models/moe/test_router.py::test_the_best",
  "models/moe/test_router.py::test_the_scale",
  "models/moe/test_sorted_rows.py::test_rows",
  "models/moe/test_moe_layer.py::test_a_router_with_a_planted_preference",
  "models/test_norms.py",
  "models/test_stacking.py",
  "training/test_clock.py::test_by_hand",
  "training/test_clock.py::test_padding",
  "training/test_health.py",
  "training/test_metrics.py",
  "training/test_optimizers.py::test_every_schedule",
  "training/test_run_directory.py",
  "inference/test_sampling.py",
  "inference/test_score.py::test_each_token",
  "evaluation/test_answers.py",
  "evaluation/test_held_out.py::test_standard",
  "evaluation/test_held_out.py::test_bits",
  "evaluation/test_tasks.py",
  "planning/test_collectives.py",
  "planning/test_cost.py",
  "planning/test_flops.py",
  "planning/test_program.py",
  "planning/test_topology.py",
  "comparison/test_budget.py",
  "comparison/test_findings.py",
  "comparison/test_match.py",
  "comparison/test_outcome.py",
  "comparison/test_record.py",
  "comparison/test_table.py",
  "scaling/test_laws.py",
  "decision/test_published_claim.py::test_mistakes",
)
"""What `pytest -m smoke` runs below a minute: the beginnings of the names of fast tests, at least one of each part."""

NOT_SMOKE = tuple(
  f"config/test_every_field_has_an_effect.py::test_{name}"
  for name in ("another_value_is_another_program", "another_value_is_another_set", "another_value_does_something_else",
               "the_program", "a_receive_factor", "what_is_evaluated", "another_seed")
)  # fmt: skip
"""Those among them that trace whole train steps."""


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
  """Files of which a run takes no test are not imported: their libraries would take longer than the smoke tests."""
  if not re.fullmatch(r"test_\w+\.py", collection_path.name):
    return None
  name, wanted = collection_path.relative_to(pathlib.Path(__file__).parent).as_posix(), config.option.markexpr
  if wanted == "smoke":
    return not any(begin.startswith(name) or name.startswith(begin) for begin in SMOKE) or None
  if wanted == "not slow and not nightly":
    return bool(re.search(r"^pytestmark = pytest\.mark\.(slow|nightly)", collection_path.read_text(), re.M)) or None
  return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Gives the fast tests of SMOKE their marker. A test cannot be both slow and nightly: `-m slow` would run it."""
  begins, without = (tuple(f"tests/{name}" for name in names) for names in (SMOKE, NOT_SMOKE))
  for item in items:
    markers = {name for name in ("slow", "nightly") if item.get_closest_marker(name)}
    if len(markers) > 1:
      raise pytest.UsageError(f"{item.nodeid} is marked both slow and nightly; keep one")
    if item.nodeid.startswith(begins) and not item.nodeid.startswith(without) and not markers:
      item.add_marker("smoke")
  gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def collected():
  """Garbage of a file is collected after its last test; what is left is never looked through again."""
  yield
  gc.collect()
  gc.freeze()


def dense() -> Experiment:
  """Every layer dense; small enough to count by hand."""
  return Experiment(
    name="dense",
    model=Model(num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, vocab_size=264),
    data=Data(sequence_length=32),
    training=Training(batch_size=8),
    optimizer=AdamW(learning_rate=1e-3),
    evaluation=Evaluation(batch_size=8),
  )


def sparse() -> Experiment:
  """The same with experts in its second layer."""
  moe = MoE(num_experts=4, experts_per_token=2, d_ff=8, every=2, group_size=32)
  return replace(
    dense(),
    name="sparse",
    model=replace(dense().model, moe=moe),
    training=replace(dense().training, losses=Losses(load_balance=0.01, router_z=0.001)),
  )


def suite() -> Suite:
  """One pair with two candidates."""
  narrow = sparse()
  assert narrow.model.moe
  wide = replace(narrow, name="wide", model=replace(narrow.model, moe=replace(narrow.model.moe, d_ff=16)))
  return Suite(name="suite", pairs=(Pair(dense=dense(), candidates=(narrow, wide)),))


@pytest.fixture
def tiny_dense() -> Experiment:
  return dense()


@pytest.fixture
def tiny_moe() -> Experiment:
  return sparse()


@pytest.fixture
def tiny_suite() -> Suite:
  return suite()


@pytest.fixture
def mine() -> str:
  """This file as a user's own: `{mine}:dense`, `{mine}:sparse` and `{mine}:suite` name experiments."""
  return str(pathlib.Path(__file__))
