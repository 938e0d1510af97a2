"""Kernels as libtpu compiles them for described chips, with the options of a train step, and what plans read of them.

R routed rows  E experts  D embed  F hidden
"""

import collections
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from planning_programs import network_of

from moejax.config.chips import CHIPS
from moejax.kernels.attention import fused_attention
from moejax.kernels.grouped_eight_bits import rounded_grouped_matmul
from moejax.planning.cost import cost
from moejax.planning.devices import describe_devices
from moejax.planning.program import parse
from moejax.planning.topology import parse_topology
from moejax.training.compiler import compiler_options

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs pip install moejax[tpu]"
)

TPUS = [chip for chip in CHIPS.values() if chip.platform == "tpu"]


def cases(soon, *of):
  """The slow tests are those of some chips, named in `soon`. The others run every night."""
  return [
    pytest.param(chip, *others, id="-".join([chip.name, *others]),
                 marks=pytest.mark.slow if chip.name in soon else pytest.mark.nightly)
    for chip, *others in of
  ]  # fmt: skip


def compiled(chip, function, *arguments):
  """The function on one device, for arguments of these shapes and types."""
  topology = parse_topology(f"{chip.name}:{'x'.join('221'[: chip.torus])}")
  device = describe_devices(topology)[0]
  here = jax.sharding.SingleDeviceSharding(device)
  shapes = [jax.ShapeDtypeStruct(dims, dtype, sharding=here) for dims, dtype in arguments]
  return jax.jit(function).lower(*shapes).compile(compiler_options=compiler_options(device))


def kernels(chip, program):
  """FLOPs and seconds of the kernels of a program, by name, as plans count them."""
  flops, seconds = collections.Counter(), collections.Counter()
  for operation in cost(parse(program.as_text()), network_of(chip.name, (2, 2, 1)[: chip.torus])).operations:
    if operation.kind.startswith("kernel "):
      name = operation.kind.removeprefix("kernel ")
      flops[name] += operation.flops
      seconds[name] += operation.time_s
  return dict(flops), dict(seconds)


@pytest.mark.parametrize(
  ("chip", "bits"), cases(("v6e", "tpu7x"), *((chip, bits) for chip in TPUS for bits in chip.eight_bits))
)
def test_the_grouped_8_bit_products_of_every_chip_that_has_them_compile_with_their_gradients(chip, bits):
  """With the matrices of Mixtral 8x7B, whose gradient takes less time than in bfloat16 on tpu7x."""
  R, E, D, F = 16_384, 8, 4096, 14_336

  def product_and_gradients(x_RD, wide_EDF, sizes_E, of_out_RF):
    def product(x_RD, wide_EDF):
      return rounded_grouped_matmul(x_RD, wide_EDF.astype(x_RD.dtype), sizes_E, bits, wide_EDF=wide_EDF)

    out_RF, pull_back = jax.vjp(product, x_RD, wide_EDF)
    return out_RF, *pull_back(of_out_RF)

  arguments = ((R, D), jnp.bfloat16), ((E, D, F), jnp.float32), ((E,), jnp.int32), ((R, F), jnp.bfloat16)
  flops, seconds = kernels(chip, compiled(chip, product_and_gradients, *arguments))
  if chip.name == "tpu7x":
    of_gradient_s = sum(seconds[name] for name in ("tgmm_8bit", "largest", "rounded_rows"))
    assert of_gradient_s < 2 * R * D * F / chip.bfloat16_flops / chip.efficiency
  assert flops == {"gmm_8bit": 2 * 2 * R * D * F, "tgmm_8bit": 2 * R * D * F, "largest": 0, "rounded_rows": 0}


@pytest.mark.parametrize("chip", cases(("v5e",), *((chip,) for chip in TPUS)))
def test_attention_with_sinks_compiles_on_the_devices_of_every_chip_and_has_no_scores_in_memory(chip):
  """A layer of gpt-oss with a window and one without."""
  T, queries, keys, width = 4096, 64, 8, 64

  def gradients(q, k, v, segments, sinks):
    def weighted(q, k, v, sinks):
      local = fused_attention(q, k, v, segments, 128, sinks)
      return fused_attention(local, k, v, segments, None, sinks).astype(jnp.float32).sum()

    return jax.grad(weighted, (0, 1, 2, 3))(q, k, v, sinks)

  of_keys = (1, T, keys, width), jnp.bfloat16
  arguments = ((1, T, queries, width), jnp.bfloat16), of_keys, of_keys, ((1, T), jnp.int32), ((queries,), jnp.float32)
  program = compiled(chip, gradients, *arguments)
  # Of 4 x 4 blocks of 1024 positions those up to the diagonal; of 16 x 16 of 256 the two that a window touches.
  scores = 10 * 1024**2 + 31 * 256**2
  of_product = 2 * queries * scores * width
  assert kernels(chip, program)[0] == {
    "splash_mha_fwd": 2 * of_product, "splash_mha_dq": 3 * of_product, "splash_mha_dkv": 4 * of_product
  }  # fmt: skip
  assert program.memory_analysis().temp_size_in_bytes < queries * T * T
