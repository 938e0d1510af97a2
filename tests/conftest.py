"""Eight simulated devices for every test, strict ranks, and three tiny experiments."""

import os
import pathlib
import tempfile
from dataclasses import replace
from importlib import metadata

import pytest

from moejax.config import AdamW, Data, Evaluation, Experiment, Losses, Model, MoE, Pair, Suite, Training

JAX = tuple(map(int, metadata.version("jax").split(".")[:2]))

# JAX reads these when it is imported, which nothing has done yet. The rank of two operands must agree, or be written.
# Programs of tests are tiny: compiling them is what takes the time, so it is done with little optimisation.
FLAGS = (
  "--xla_force_host_platform_device_count=8",
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
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
