"""Which devices are compiled for with which options."""

import dataclasses
import os
import re

import jax
import pytest

from moejax.config.chips import CHIPS
from moejax.config.fields import with_fields
from moejax.experiments import EXPERIMENTS
from moejax.gpu_memory import SHARE, VARIABLES, use_gpu_memory
from moejax.planning import gpu_target
from moejax.training.compiler import CHUNKS, EXCHANGE, FUSION, OVERLAP, SPARSE_CORES, compiler_options


@dataclasses.dataclass(frozen=True)
class Described:
  platform: str
  device_kind: str


def test_cpus_have_no_options():
  assert compiler_options(jax.devices()[0]) == {}


@pytest.mark.parametrize(
  "chip", [chip for chip in CHIPS.values() if chip.platform == "gpu"], ids=lambda chip: chip.name
)
def test_xla_schedules_for_all_memory_of_a_gpu_that_a_run_has(chip):
  """XLA's limit for temporaries is a factor of 80 % of the memory, without the arguments."""
  memory = chip.hbm_bytes / SHARE
  for arguments in (0, 10 * 2**30, 30 * 2**30, int(0.7 * memory)):
    options = compiler_options(Described("gpu", chip.device_kinds[0]), arguments=arguments)
    limit = int(options["xla_gpu_memory_limit_slop_factor"]) / 100 * (0.8 * memory - arguments)
    assert 0.98 * (chip.hbm_bytes - arguments) < limit <= chip.hbm_bytes - arguments
  assert compiler_options(Described("gpu", chip.device_kinds[0]), arguments=int(0.81 * memory)) == {}
  described = int(re.search(r"device_memory_size: (\d+)", gpu_target.describe(chip.name))[1])
  assert chip.hbm_bytes == pytest.approx(SHARE * described, rel=0.01)


def test_the_share_of_the_memory_of_a_gpu_is_set_unless_a_user_has_set_one(monkeypatch):
  monkeypatch.setattr(os, "environ", {})
  use_gpu_memory()
  assert os.environ == {"XLA_CLIENT_MEM_FRACTION": str(SHARE)}
  for name in VARIABLES:
    monkeypatch.setattr(os, "environ", {name: "0.5"})
    use_gpu_memory()
    assert os.environ == {name: "0.5"}


@pytest.mark.parametrize(("chunks", "is_asynchronous"), [(1, False), (2, True)])
def test_rows_travel_beside_products_where_they_are_exchanged_in_chunks(chunks, is_asynchronous):
  experiment = EXPERIMENTS["qwen3_30b_a3b"]()
  model = with_fields(experiment, {"model.moe.dispatch.exchange_chunks": chunks}).model
  options = compiler_options(Described("tpu", "TPU v5p"), model)
  assert (options.items() >= CHUNKS.items()) is is_asynchronous
  assert not compiler_options(Described("gpu", "NVIDIA H100 80GB HBM3"), model).items() & CHUNKS.items()


@pytest.mark.parametrize(
  ("device_kind", "sparse_cores", "fusion"),
  [
    ("TPU v4", False, False),
    ("TPU v5", True, False),
    ("TPU v5p", True, False),
    ("TPU v5 lite", False, True),
    ("TPU v6 lite", True, False),
    ("TPU7x", True, False),
  ],
)
def test_weights_travel_by_sparse_cores_where_runs_are_known_that_did_it_and_in_fusions_on_v5e_alone(
  device_kind, sparse_cores, fusion
):
  options = compiler_options(Described("tpu", device_kind))
  assert options.items() >= OVERLAP.items()
  assert (options.items() >= SPARSE_CORES.items()) is sparse_cores
  assert (options.items() >= FUSION.items()) is fusion
  assert (options.items() >= EXCHANGE.items()) is not fusion
