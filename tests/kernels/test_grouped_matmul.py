"""The grouped product and both its gradients against a loop over experts, on every backend.

Kernels for TPU and GPU run in Pallas' interpreter. Group sizes are traced, so that one program serves all of them.
"""

import contextlib
import functools
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.kernels import grouped_matmul_tpu
from moejax.kernels.grouped_matmul import grouped_matmul

R, E, D, F = 200, 5, 48, 80
SIZES = {
  "equal": [40, 40, 40, 40, 40],
  "uneven": [3, 97, 21, 66, 13],
  "empty groups": [0, 131, 0, 69, 0],
  "one-row groups": [1, 1, 196, 1, 1],
  "all in one": [0, 0, 200, 0, 0],
  "all in the last": [0, 0, 0, 0, 200],
  "padding rows": [64, 0, 33, 5, 32],
  "one row": [0, 0, 0, 1, 0],
  "no rows": [0, 0, 0, 0, 0],
}


def reference(x_RD, w_EDF, group_sizes_E, of_out_RF):
  """Product, gradient of x, gradient of w: expert by expert, in float64."""
  x_RD, w_EDF, of_out_RF = (np.asarray(a, np.float64) for a in (x_RD, w_EDF, of_out_RF))
  out_RF, of_x_RD, of_w_EDF = np.zeros_like(of_out_RF), np.zeros_like(x_RD), np.zeros_like(w_EDF)
  start = 0
  for e, size in enumerate(group_sizes_E):
    rows = slice(start, start + size)
    out_RF[rows] = x_RD[rows] @ w_EDF[e]
    of_x_RD[rows] = of_out_RF[rows] @ w_EDF[e].T
    of_w_EDF[e] = x_RD[rows].T @ of_out_RF[rows]
    start += size
  return out_RF, of_x_RD, of_w_EDF


@functools.partial(jax.jit, static_argnames="backend")
def product_and_gradients(x_RD, w_EDF, group_sizes_E, of_out_RF, backend):
  out_RF, pull_back = jax.vjp(lambda x, w: grouped_matmul(x, w, group_sizes_E, backend=backend), x_RD, w_EDF)
  return out_RF, *pull_back(of_out_RF)


def operands(rows, experts, inner, outer, x_dtype="float32", w_dtype="float32", seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  x_RD = jax.random.normal(keys[0], (rows, inner), x_dtype)
  w_EDF = jax.random.normal(keys[1], (experts, inner, outer), w_dtype)
  return x_RD, w_EDF, jax.random.normal(keys[2], (rows, outer), x_dtype)


def assert_equals_reference(x_RD, w_EDF, group_sizes_E, of_out_RF, backend):
  """Of rows that belong to no group all sides hold NaN, which must not leave them."""
  used = int(np.sum(group_sizes_E))
  x_RD, of_out_RF = x_RD.at[used:].set(np.nan), of_out_RF.at[used:].set(np.nan)
  found = product_and_gradients(x_RD, w_EDF, jnp.asarray(group_sizes_E, jnp.int32), of_out_RF, backend)
  expected = reference(x_RD, w_EDF, group_sizes_E, of_out_RF)
  for name, a, b, like in zip(("out", "x", "w"), found, expected, (of_out_RF, x_RD, w_EDF), strict=True):
    assert a.dtype == like.dtype, name
    # Sums of up to 200 products of size 1: 1e-5 of float32 rounding; bfloat16 rounds the result to 8 bits.
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if a.dtype == jnp.float32 else {"rtol": 2**-8, "atol": 1e-4}
    np.testing.assert_allclose(np.asarray(a, np.float64), b, err_msg=name, **tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["cpu", "tpu", "gpu"])
@pytest.mark.parametrize("case", SIZES)
def test_product_and_gradients_equal_a_loop_over_experts(case, backend, dtype):
  x_RD, w_EDF, of_out_RF = operands(R, E, D, F, dtype, dtype)
  assert_equals_reference(x_RD, w_EDF, SIZES[case], of_out_RF, backend)


@pytest.mark.parametrize("backend", ["cpu", "tpu", "gpu"])
def test_rows_and_weights_may_differ_in_type_and_each_gradient_has_its_own(backend):
  x_RD, w_EDF, of_out_RF = operands(R, E, D, F, "bfloat16", "float32")
  assert_equals_reference(x_RD, w_EDF, SIZES["uneven"], of_out_RF, backend)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[20, 230, 40, 0], [1, 0, 299, 0], [0, 95, 96, 97], [129, 0, 31, 128]])
def test_on_cpu_the_last_large_block_of_a_group_may_reach_into_other_groups(sizes):
  """Large blocks have 128 rows, and small ones 32."""
  x_RD, w_EDF, of_out_RF = operands(300, len(sizes), 5, 3)
  assert_equals_reference(x_RD, w_EDF, sizes, of_out_RF, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "tpu", "gpu"])
@pytest.mark.parametrize("rows, sizes", [(1, [0, 1, 0]), (7, [3, 0, 4]), (5, [5])])
def test_fewer_rows_than_any_tile_and_dimensions_that_no_tile_divides(rows, sizes, backend):
  x_RD, w_EDF, of_out_RF = operands(rows, len(sizes), 5, 3)
  assert_equals_reference(x_RD, w_EDF, sizes, of_out_RF, backend)


def test_an_array_without_rows_gives_none_and_zero_gradients():
  x_RD, w_EDF, of_out_RF = operands(0, E, D, F)
  out_RF, of_x_RD, of_w_EDF = product_and_gradients(x_RD, w_EDF, jnp.zeros(E, jnp.int32), of_out_RF, "auto")
  assert out_RF.shape == (0, F) and of_x_RD.shape == (0, D)
  np.testing.assert_array_equal(of_w_EDF, np.zeros((E, D, F)))


def test_tpu_tiles_may_split_every_dimension_and_leave_a_rest(monkeypatch):
  monkeypatch.setattr(grouped_matmul_tpu, "VMEM_BYTES", 600_000)
  rows, inner, outer = 300, 300, 450
  assert grouped_matmul_tpu.gmm_tiles(rows, E, inner, outer, 4) == (128, 128, 128)
  assert grouped_matmul_tpu.tgmm_tiles(rows, E, inner, outer, 4) == (128, 128, 128)
  x_RD, w_EDF, of_out_RF = operands(rows, E, inner, outer)
  assert_equals_reference(x_RD, w_EDF, [140, 0, 1, 127, 9], of_out_RF, "tpu")


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_groups_of_many_tiles(backend):
  x_RD, w_EDF, of_out_RF = operands(1500, 3, 128, 256)
  assert_equals_reference(x_RD, w_EDF, [1100, 50, 290], of_out_RF, backend)


@pytest.mark.parametrize("platform, kernel", [("tpu", "tpu_custom_call"), ("cuda", "triton"), ("cpu", None)])
def test_auto_takes_the_kernel_of_the_platform_that_the_program_is_lowered_for(platform, kernel):
  x_RD, w_EDF, of_out_RF = operands(R, E, D, F)
  sizes_E = jnp.zeros(E, jnp.int32)
  # Triton kernels are lowered for one kind of GPU, which JAX from 0.12 on wants to be told where none is present.
  gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=gpu)
  with jax.sharding.use_abstract_mesh(mesh) if platform == "cuda" else contextlib.nullcontext():
    traced = product_and_gradients.trace(x_RD, w_EDF, sizes_E, of_out_RF, "auto")
    text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert [name for name in ("tpu_custom_call", "triton") if name in text] == [kernel] * (kernel is not None)


def test_a_rematerialized_scan_over_layers_has_the_gradients_of_a_loop():
  layers, sizes_E = 3, jnp.array([10, 0, 25, 4, 1], jnp.int32)
  x_RD, w_EDF, _ = operands(40, E, 16, 16)
  w_LEDF = jnp.stack([w_EDF, 0.5 * w_EDF, -w_EDF]) * 0.1

  def scanned(x_RD, w_LEDF):
    layer = jax.checkpoint(lambda x_RD, w_EDF: (jnp.tanh(grouped_matmul(x_RD, w_EDF, sizes_E)), None))
    return jnp.sum(jnp.square(jax.lax.scan(layer, x_RD, w_LEDF)[0]))

  def looped(x_RD, w_LEDF):
    expert_R = jnp.repeat(jnp.arange(E), sizes_E, total_repeat_length=40)
    for i in range(layers):
      x_RD = jnp.tanh(jnp.einsum("RD,RDF->RF", x_RD, w_LEDF[i][expert_R], precision="highest"))
    return jnp.sum(jnp.square(x_RD))

  for mine, other in zip(*(jax.jit(jax.grad(f, (0, 1)))(x_RD, w_LEDF) for f in (scanned, looped)), strict=True):
    np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "tpu", "gpu"])
def test_each_device_multiplies_its_own_rows_experts_and_columns(backend):
  """Rows over data and expert, experts over expert, columns over model; the gradient of w adds up over data."""
  mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
  sizes_UE = np.array([[9, 3], [0, 12], [5, 0], [1, 10]])  # of each share of the rows; its experts
  x_RD, w_EDF, of_out_RF = operands(48, 4, 8, 6)
  rows, weights = P(("data", "expert")), P("expert", None, "model")

  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(rows, weights, rows), out_specs=P(("data", "expert"), "model"), check_vma=False
  )
  def sharded(x_rD, w_eDf, group_sizes_e):
    return grouped_matmul(x_rD, w_eDf, group_sizes_e, backend=backend)

  @jax.jit
  def found(x_RD, w_EDF):
    sizes = jnp.asarray(sizes_UE.reshape(-1), jnp.int32)
    out_RF, pull_back = jax.vjp(lambda x, w: sharded(x, w, sizes), x_RD, w_EDF)
    return out_RF, *pull_back(of_out_RF)

  expected = np.zeros((48, 6)), np.zeros((48, 8)), np.zeros((4, 8, 6))
  for share, sizes_E in enumerate(sizes_UE):
    own, experts = slice(12 * share, 12 * share + 12), slice(2 * (share % 2), 2 * (share % 2) + 2)
    out, of_x, of_w = reference(x_RD[own], w_EDF[experts], sizes_E, of_out_RF[own])
    expected[0][own], expected[1][own] = out, of_x
    expected[2][experts] += of_w
  for a, b in zip(found(x_RD, w_EDF), expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_experts", [16, 128])
@pytest.mark.parametrize("mean_rows", [1280, 4096, 10_000])
def test_tpu_row_tiles_compute_less_than_a_tenth_twice_where_groups_are_large(num_experts, mean_rows):
  rows = mean_rows * num_experts
  tile = grouped_matmul_tpu.row_tile(rows, num_experts)
  assert grouped_matmul_tpu.visits(rows, num_experts, tile) * tile <= 1.1 * rows + tile


@pytest.mark.parametrize("inner, outer", [(512, 1024), (4096, 14336), (7168, 2048), (1408, 2880), (72, 100)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tpu_tiles_multiply_at_most_a_thirtieth_beyond_the_dimensions(inner, outer, itemsize):
  for tiles in (
    grouped_matmul_tpu.gmm_tiles(65536, 16, inner, outer, itemsize),
    grouped_matmul_tpu.tgmm_tiles(65536, 16, inner, outer, itemsize),
  ):
    for tile, size in zip(tiles[1:], (inner, outer), strict=True):
      assert -(-size // tile) * tile <= size * 1.031


@pytest.mark.parametrize(
  "x_shape, w_shape, sizes_shape", [((4, 3), (2, 5, 6), (2,)), ((4, 3), (2, 3, 6), (3,)), ((1, 4, 3), (2, 3, 6), (2,))]
)
def test_shapes_that_do_not_fit_are_refused(x_shape, w_shape, sizes_shape):
  with pytest.raises(ValueError, match="x_RD, w_EDF and group_sizes_E"):
    grouped_matmul(jnp.zeros(x_shape), jnp.zeros(w_shape), jnp.zeros(sizes_shape, jnp.int32))


def test_other_types_are_refused():
  with pytest.raises(TypeError, match="float16"):
    grouped_matmul(jnp.zeros((4, 3), jnp.float16), jnp.zeros((2, 3, 6)), jnp.zeros(2, jnp.int32))


PASSES = """
import jax, jax.numpy as jnp
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.planning.cost import NO_WORK
from moejax.planning.devices import describe_devices
from moejax.planning.program import parse
from moejax.planning.topology import parse_topology, prepare_environment

topology = parse_topology("gpu:h100:8")
prepare_environment(topology)
here = jax.sharding.SingleDeviceSharding(describe_devices(topology)[0])
shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=here)
R, E, D, F = 4103, 8, 256, 512

def gradients(x_RD, w_EDF, sizes_E, of_out_RF):
  return jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E), x_RD, w_EDF)[1](of_out_RF)

arguments = shape("bfloat16", R, D), shape("bfloat16", E, D, F), shape("int32", E), shape("bfloat16", R, F)
program = parse(jax.jit(gradients).lower(*arguments).compile().as_text())
for instruction in program.computations[program.entry].instructions:
  if instruction.opcode not in NO_WORK and instruction.bytes > R * D:
    print(instruction.opcode)
"""


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda12_plugin") is None, reason="compiling for GPU needs pip install moejax[gpu-plan]"
)
def test_on_gpu_the_kernels_alone_read_and_write_the_rows():
  """No number of rows is padded, and rows of no group are zeros without another pass. In another process, as XLA's
  flags of this one name devices of CPU."""
  done = subprocess.run([sys.executable, "-c", PASSES], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.split() == ["custom-call"] * 2
