"""Which devices are compiled for with which options."""

import dataclasses

import jax
import pytest

from moejax.config.fields import with_fields
from moejax.experiments import EXPERIMENTS
from moejax.training.compiler import CHUNKS, EXCHANGE, FUSION, OVERLAP, SPARSE_CORES, compiler_options


@dataclasses.dataclass(frozen=True)
class Described:
  platform: str
  device_kind: str


def test_only_tpus_have_options():
  assert compiler_options(jax.devices()[0]) == {}
  assert compiler_options(Described("gpu", "NVIDIA H100 80GB HBM3")) == {}


@pytest.mark.parametrize(("chunks", "is_asynchronous"), [(1, False), (2, True)])
def test_rows_travel_beside_products_where_they_are_exchanged_in_chunks(chunks, is_asynchronous):
  experiment = EXPERIMENTS["qwen3_30b_a3b"]()
  model = with_fields(experiment, {"model.moe.dispatch.exchange_chunks": chunks}).model
  options = compiler_options(Described("tpu", "TPU v5p"), model)
  assert (options.items() >= CHUNKS.items()) is is_asynchronous
  assert compiler_options(Described("gpu", "NVIDIA H100 80GB HBM3"), model) == {}


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
