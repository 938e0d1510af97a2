"""The grouped matrix product of 8-bit operands: the matrix of each expert times its rows, rounded for each product.

R routed rows  E experts  D embed  F hidden  X = D or F

Scales are those of `eight_bits.einsum` for "ERD,EDF->ERF", where each expert has rows of its own: one for each row and
for each column of each matrix, and, in the gradient of a matrix, whose contracted dimension are the rows of its expert,
one for each column of these rows. Rows of other experts have no influence, so that an expert with small gradients keeps
its precision. The kernels multiply by the scales before they store a result.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moejax.kernels import grouped_eight_bits_tpu
from moejax.kernels.eight_bits import GRADIENTS, VALUES, EightBits, scales, to_eight_bits
from moejax.kernels.grouped_matmul import Backend, on_platform

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Spread:
  """Within `jax.shard_map`, the mesh axes over which a dimension is spread. The devices along them agree on the largest
  values, so that scales do not depend on the mesh."""

  rows: Axes = ()
  """Of the rows of one expert."""
  inner: Axes = ()
  """Of D."""
  outer: Axes = ()
  """Of F."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedMatrices:
  """The matrices of all experts, rounded once for many products without gradients."""

  values_EDF: jax.Array
  scales_EF: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values_EDF.shape

  def __len__(self) -> int:
    return len(self.values_EDF)


def rounded_matrices(w_EDF: jax.Array, bits: EightBits) -> RoundedMatrices:
  """The matrices as `rounded_grouped_matmul` rounds them."""
  return RoundedMatrices(*_rounded(w_EDF, jnp.dtype(VALUES[bits]), 1, ()))


def rounded_grouped_matmul(
  x_RD: jax.Array,
  w_EDF: jax.Array | RoundedMatrices,
  group_sizes_E: jax.Array,
  bits: EightBits,
  *,
  wide_EDF: jax.Array | None = None,
  spread: Spread = Spread(),
  backend: Backend = "auto",
) -> jax.Array:
  """`grouped_matmul` of rounded operands, in both products of the backward pass as well. See there for the arguments.

  If D is spread over devices, the result is this device's part of the sum.

  Args:
    w_EDF: the matrices, or what `rounded_matrices` made of them, which has no gradients and is not spread.
    bits: the type of the operands.
    spread: mesh axes over which dimensions are spread.
  """
  if x_RD.shape[0] == 0:
    return jnp.zeros((0, w_EDF.shape[2]), x_RD.dtype)
  if isinstance(w_EDF, RoundedMatrices):
    return _of_rounded(x_RD, w_EDF.values_EDF, w_EDF.scales_EF, group_sizes_E.astype(jnp.int32), spread, backend)
  receiver = w_EDF if wide_EDF is None else wide_EDF
  value = jax.lax.stop_gradient(w_EDF)
  return _product(x_RD, value, receiver, group_sizes_E.astype(jnp.int32), bits, spread, backend, receiver.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _product(
  x_RD: jax.Array,
  w_EDF: jax.Array,
  receiver: jax.Array,
  group_sizes_E: jax.Array,
  bits: EightBits,
  spread: Spread,
  backend: Backend,
  gradient: jnp.dtype,
) -> jax.Array:
  """The product. `receiver`, whose dtype is `gradient`, receives the gradient of the weight."""
  w_8, w_scales_EF = _rounded(w_EDF, jnp.dtype(VALUES[bits]), 1, spread.inner)
  return _of_rounded(x_RD, w_8, w_scales_EF, group_sizes_E, spread, backend)


def _of_rounded(
  x_RD: jax.Array,
  w_8_EDF: jax.Array,
  w_scales_EF: jax.Array,
  group_sizes_E: jax.Array,
  spread: Spread,
  backend: Backend,
) -> jax.Array:
  """The product with matrices that are rounded already."""
  x_8, x_scales_R = _rounded(x_RD, w_8_EDF.dtype, 1, spread.inner)
  return _run("gmm", backend, x_8, w_8_EDF, group_sizes_E, x_scales_R, w_scales_EF, transpose_w=False, dtype=x_RD.dtype)


def _forward(
  x_RD: jax.Array,
  w_EDF: jax.Array,
  receiver: jax.Array,
  group_sizes_E: jax.Array,
  bits: EightBits,
  spread: Spread,
  backend: Backend,
  gradient: jnp.dtype,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  out_RF = _product(x_RD, w_EDF, receiver, group_sizes_E, bits, spread, backend, gradient)
  return out_RF, (x_RD, w_EDF, group_sizes_E)


def _backward(
  bits: EightBits,
  spread: Spread,
  backend: Backend,
  gradient: jnp.dtype,
  saved: tuple[jax.Array, ...],
  of_out_RF: jax.Array,
) -> tuple[jax.Array, None, jax.Array, None]:
  x_RD, w_EDF, sizes_E = saved
  types = jnp.dtype(VALUES[bits]), jnp.dtype(GRADIENTS[bits])
  of_out_8, of_out_scales_R = _rounded(of_out_RF, types[1], 1, spread.outer)
  w_8, w_scales_ED = _rounded(w_EDF, types[0], 2, spread.outer)
  of_x_RD = _run(
    "gmm", backend, of_out_8, w_8, sizes_E, of_out_scales_R, w_scales_ED, transpose_w=True, dtype=x_RD.dtype
  )

  def of_groups(a_RX: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return scales(_over(spread.rows, _run("largest", backend, a_RX, sizes_E)), dtype)

  columns = of_groups(x_RD, types[0]), of_groups(of_out_RF, types[1])
  of_w_EDF = _run("tgmm", backend, x_RD, of_out_RF, sizes_E, *columns, types=types, dtype=gradient)
  return of_x_RD, None, of_w_EDF, None


_product.defvjp(_forward, _backward)

_run = functools.partial(on_platform, of_tpu=grouped_eight_bits_tpu)


def _rounded(a: jax.Array, dtype: jnp.dtype, contracted: int, axes: Axes) -> tuple[jax.Array, jax.Array]:
  """`a` in 8 bits, and its scales, which lack the contracted dimension."""
  a = a.astype(jnp.float32)
  found = scales(_over(axes, jnp.max(jnp.abs(a), axis=contracted)), dtype)
  return to_eight_bits(a / jnp.expand_dims(found, contracted), dtype), found


def _over(axes: Axes, largest: jax.Array) -> jax.Array:
  return jax.lax.pmax(largest, axes) if axes else largest
