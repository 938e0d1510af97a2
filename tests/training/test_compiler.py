"""Which devices are compiled for with which options."""

import dataclasses

import jax
import pytest

from moejax.training.compiler import OVERLAP, SPARSE_CORES, compiler_options


@dataclasses.dataclass(frozen=True)
class Described:
  platform: str
  device_kind: str


def test_only_tpus_have_options():
  assert compiler_options(jax.devices()[0]) == {}
  assert compiler_options(Described("gpu", "NVIDIA H100 80GB HBM3")) == {}


@pytest.mark.parametrize(("device_kind", "offloads"), [("TPU v4", False), ("TPU v5", False), ("TPU v5 lite", False),
                                                       ("TPU v6 lite", True), ("TPU7x", True)])  # fmt: skip
def test_sparse_cores_sum_gradients_where_runs_are_known_that_did_it(device_kind, offloads):
  options = compiler_options(Described("tpu", device_kind))
  assert options.items() >= OVERLAP.items()
  assert (options.items() >= SPARSE_CORES.items()) is offloads
