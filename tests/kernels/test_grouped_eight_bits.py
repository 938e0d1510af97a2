"""The grouped product of 8-bit operands and both its gradients against a plain reference that rounds, multiplies and
scales expert by expert, on every backend. Kernels for TPU and GPU run in Pallas' interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_eight_bits import TYPES, rounded
from test_grouped_matmul import SIZES, D, E, F, R, operands

from moejax.kernels import eight_bits, grouped_eight_bits_tpu, grouped_matmul_tpu
from moejax.kernels.grouped_eight_bits import Spread, rounded_grouped_matmul

BITS = ["fp8", "int8"]
BACKENDS = ["cpu", "tpu", "gpu"]
OF_TILES = pytest.mark.parametrize(
  "bits", [pytest.param("int8", marks=pytest.mark.slow), pytest.param("fp8", marks=pytest.mark.nightly)]
)
"""Tiles depend on the number of bits alone, and int8 is the faster one to simulate. Other tests of the gate have both
types on every backend."""


def reference(x_RD, w_EDF, group_sizes_E, of_out_RF, bits):
  """Product, gradient of x, gradient of w."""
  of_values, of_gradients = TYPES[bits]
  x_RD, w_EDF, of_out_RF = (np.asarray(a, np.float32) for a in (x_RD, w_EDF, of_out_RF))
  out_RF, of_x_RD, of_w_EDF = np.zeros_like(of_out_RF), np.zeros_like(x_RD), np.zeros_like(w_EDF)
  start = 0
  for e, size in enumerate(group_sizes_E):
    rows = slice(start, start + size)
    start += size
    if size == 0:
      continue
    x, w, of_out = x_RD[rows], w_EDF[e], of_out_RF[rows]
    out_RF[rows] = rounded(x, [1], of_values) @ rounded(w, [0], of_values)
    of_x_RD[rows] = rounded(of_out, [1], of_gradients) @ rounded(w, [1], of_values).T
    of_w_EDF[e] = rounded(x, [0], of_values).T @ rounded(of_out, [0], of_gradients)
  return out_RF, of_x_RD, of_w_EDF


@functools.partial(jax.jit, static_argnames=("bits", "backend"))
def product_and_gradients(x_RD, w_EDF, group_sizes_E, of_out_RF, bits, backend):
  def product(x_RD, w_EDF):
    return rounded_grouped_matmul(x_RD, w_EDF, group_sizes_E, bits, backend=backend)

  out_RF, pull_back = jax.vjp(product, x_RD, w_EDF)
  return out_RF, *pull_back(of_out_RF)


def unlike(rows, experts, inner, outer, sizes, dtype="float32"):
  """Operands whose experts have values of different sizes, and NaN in rows of no group."""
  x_RD, w_EDF, of_out_RF = (np.array(a, np.float32) for a in operands(rows, experts, inner, outer))
  ends = np.cumsum(sizes)
  for e, (end, size) in enumerate(zip(ends, sizes, strict=True)):
    x_RD[end - size : end] *= 10.0**-e
    of_out_RF[end - size : end] *= 100.0**-e
  x_RD[ends[-1] :] = of_out_RF[ends[-1] :] = np.nan
  return jnp.asarray(x_RD, dtype), jnp.asarray(w_EDF, dtype), jnp.asarray(of_out_RF, dtype)


def assert_equals_reference(arrays, sizes, bits, backend):
  """Up to a few values, more in bfloat16, between two of 8 bits, which the last digit of the scale decides."""
  x_RD, w_EDF, of_out_RF = arrays
  found = product_and_gradients(x_RD, w_EDF, jnp.asarray(sizes, jnp.int32), of_out_RF, bits, backend)
  expected = reference(x_RD, w_EDF, sizes, of_out_RF, bits)
  ends = np.cumsum(sizes)
  for name, a, b, like in zip(("out", "x", "w"), found, expected, (of_out_RF, x_RD, w_EDF), strict=True):
    assert a.dtype == like.dtype, name
    close = 1e-2 if x_RD.dtype == jnp.bfloat16 else 3e-3
    a = np.asarray(a, np.float32)
    for e, (end, size) in enumerate(zip(ends, sizes, strict=True)):  # each at its own size
      one, other = (c[e] if name == "w" else c[end - size : end] for c in (a, b))
      assert np.linalg.norm(one - other) <= close * np.linalg.norm(other), (name, e)
    if name != "w":
      assert not a[ends[-1] :].any(), name


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SIZES)
def test_product_and_gradients_equal_those_of_rounded_operands(case, backend, bits):
  assert_equals_reference(unlike(R, E, D, F, SIZES[case]), SIZES[case], bits, backend)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_in_bfloat16_and_dimensions_that_no_tile_divides(backend, bits):
  assert_equals_reference(unlike(R, E, D, F, SIZES["uneven"], "bfloat16"), SIZES["uneven"], bits, backend)
  for rows, sizes in ((300, [140, 1, 127]), *([(1, [0, 1, 0]), (7, [3, 0, 4])] if bits == "int8" else [])):
    assert_equals_reference(unlike(rows, 3, 5, 3, sizes), sizes, bits, backend)


@OF_TILES
def test_tpu_tiles_may_split_every_dimension_and_leave_a_rest(bits, monkeypatch):
  monkeypatch.setattr(grouped_matmul_tpu, "VMEM_BYTES", 600_000)
  sizes = [140, 0, 1, 127, 9]
  assert grouped_matmul_tpu.gmm_tiles(300, E, 1024, 512, 1, 4) == (128, 256, 256)
  assert grouped_matmul_tpu.tgmm_tiles(300, E, 1024, 512, 4) == (128, 128, 128)
  assert_equals_reference(unlike(300, E, 900, 450, sizes), sizes, bits, "tpu")


@OF_TILES
@pytest.mark.parametrize("inner, outer", [(640, 90), (90, 640)])
def test_on_tpu_one_operand_of_the_gradient_of_matrices_may_be_rounded_before_the_kernel(
  inner, outer, bits, monkeypatch
):
  monkeypatch.setattr(grouped_matmul_tpu, "VMEM_BYTES", 600_000)
  sizes = [140, 0, 1, 127, 9]
  of_scales = 300 * (inner + outer) * 4
  of_narrow = 384 * 128 * (4 + 1)  # which is read for every tile of the wide one
  assert grouped_eight_bits_tpu.bytes_before_tgmm(300, E, inner, outer, 4, 4) == of_scales + of_narrow
  assert_equals_reference(unlike(300, E, inner, outer, sizes), sizes, bits, "tpu")


@pytest.mark.parametrize("bits", BITS)
def test_experts_with_equal_groups_have_the_scales_of_a_batched_product(bits):
  x_RD, w_EDF, of_out_RF = operands(40, 4, 16, 24)
  x_ERD, of_out_ERF = x_RD.reshape(4, 10, 16), of_out_RF.reshape(4, 10, 24)
  sizes_E = jnp.full(4, 10)
  found = product_and_gradients(x_RD, w_EDF, sizes_E, of_out_RF, bits, "cpu")

  @jax.jit
  def batched(x_ERD, w_EDF, of_out_ERF):
    return (
      eight_bits.einsum("ERD,EDF->ERF", x_ERD, w_EDF, bits).reshape(40, 24),
      eight_bits.einsum("ERF,EDF->ERD", of_out_ERF, w_EDF, bits, of_gradient=True).reshape(40, 16),
      eight_bits.einsum("ERF,ERD->EDF", of_out_ERF, x_ERD, bits, of_gradient=True),
    )

  expected = batched(x_ERD, w_EDF, of_out_ERF)
  for a, b in zip(found, expected, strict=True):
    assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= 2e-3 * np.linalg.norm(b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_that_is_not_finite_reaches_the_results_of_its_expert_alone(backend):
  x_RD, w_EDF, of_out_RF = operands(R, E, D, F)
  x_RD = x_RD.at[50, 3].set(np.nan)  # of the second expert
  sizes_E = jnp.asarray(SIZES["equal"], jnp.int32)
  out_RF, of_x_RD, of_w_EDF = product_and_gradients(x_RD, w_EDF, sizes_E, of_out_RF, "fp8", backend)
  assert not np.isfinite(out_RF[50]).any() and np.isfinite(np.delete(out_RF, 50, axis=0)).all()
  assert np.isfinite(of_x_RD).all()
  assert not np.isfinite(of_w_EDF[1, 3]).any() and np.isfinite(np.delete(of_w_EDF, 1, axis=0)).all()


@pytest.mark.parametrize(
  ("backend", "bits"),
  [
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("cpu", "fp8"), ("cpu", "int8"), ("tpu", "fp8"))),
    pytest.param("tpu", "int8", marks=pytest.mark.nightly),  # which has the scales of both
  ],
)
def test_devices_that_share_a_dimension_have_the_scales_of_the_whole(backend, bits):
  """Rows of one expert over data, and D or F over model."""
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  x_RD, w_EDF, of_out_RF = operands(24, 2, 8, 6)
  x_RD, of_out_RF = (a * jnp.where(jnp.arange(24) < 12, 1, 30)[:, None] for a in (x_RD, of_out_RF))
  sizes_UE = np.array([[4, 8], [7, 5]])
  order = np.argsort(np.repeat([0, 1, 0, 1], sizes_UE.reshape(-1)), kind="stable")  # all rows of an expert together
  whole = product_and_gradients(
    x_RD[order], w_EDF, jnp.asarray(sizes_UE.sum(0), jnp.int32), of_out_RF[order], bits, backend
  )
  back = np.argsort(order)

  for inner, outer in (((), ("model",)), (("model",), ())):
    of_d, of_f = inner[0] if inner else None, outer[0] if outer else None
    specs = P("data", of_d), P(None, of_d, of_f), P("data"), P("data", of_f)

    def sharded(x_rd, w_Edf, sizes_e, of_out_rf, inner=inner, outer=outer):
      def product(x_rd, w_Edf):
        spread = Spread(("data",), inner, outer)
        return rounded_grouped_matmul(x_rd, w_Edf, sizes_e, bits, spread=spread, backend=backend)

      out_rf, pull_back = jax.vjp(product, x_rd, w_Edf)
      of_x_rd, of_w_Edf = pull_back(of_out_rf)
      out_rf, of_x_rd = (jax.lax.psum(a, axes) if axes else a for a, axes in ((out_rf, inner), (of_x_rd, outer)))
      return out_rf, of_x_rd, jax.lax.psum(of_w_Edf, "data")

    out_specs = P("data", of_f), P("data", of_d), P(None, of_d, of_f)
    run = jax.jit(jax.shard_map(sharded, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False))
    found = run(x_RD, w_EDF, jnp.asarray(sizes_UE.reshape(-1), jnp.int32), of_out_RF)
    for a, b in zip(found, (whole[0][back], whole[1][back], whole[2]), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_an_array_without_rows_gives_none_and_zero_gradients():
  x_RD, w_EDF, of_out_RF = operands(0, E, D, F)
  out_RF, of_x_RD, of_w_EDF = product_and_gradients(x_RD, w_EDF, jnp.zeros(E, jnp.int32), of_out_RF, "fp8", "auto")
  assert out_RF.shape == (0, F) and of_x_RD.shape == (0, D) and not np.any(of_w_EDF)


@pytest.mark.parametrize("inner, outer", [(4096, 14336), (7168, 2048), (1408, 2944)])
def test_tpu_tiles_of_8_bits_are_whole_and_fit_in_vmem(inner, outer):
  r, i, j = grouped_matmul_tpu.gmm_tiles(65536, 16, inner, outer, 1, 2)
  assert inner % i == 0 and i % grouped_eight_bits_tpu.LANES == 0 and j % grouped_eight_bits_tpu.LANES == 0
  assert 2 * (r * i + i * j) + 8 * r * j <= grouped_matmul_tpu.VMEM_BYTES
