"""Grouped matrix products as loops over experts and blocks of rows, in plain JAX: fast on CPU, and correct on any
platform.

R routed rows  E experts  D embed  F hidden  I contracted dimension  J other dimension
X = D or F

D and F may be either way round. b is the number of rows of one block.

The loops visit only rows of groups, so that an uneven load costs only the partly filled last blocks of each group. The
matrix of an expert is read from the stack once for all of its blocks.
"""

import jax
import jax.numpy as jnp

from moejax.kernels.eight_bits import rounded_groups
from moejax.kernels.row_blocks import Block, row_blocks


def gmm(
  x_RI: jax.Array,
  w_EDF: jax.Array,
  group_sizes_E: jax.Array,
  *scales: jax.Array,
  transpose_w: bool,
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """Returns out_RJ: the rows of each group times the matrix of its expert, or times its transpose. 8-bit operands
  have `scales`, [R] and [E, J], and are multiplied in float32."""
  summed, J = (1, w_EDF.shape[1]) if transpose_w else (0, w_EDF.shape[2])
  blocks = row_blocks(len(x_RI), len(w_EDF))
  ends_E = jnp.cumsum(group_sizes_E)

  # Those with rows come first, and only they are visited.
  experts_E = jnp.argsort(group_sizes_E == 0, stable=True)

  def expert(i: jax.Array, out_RJ: jax.Array) -> jax.Array:
    e = experts_E[i]
    w = jax.lax.dynamic_index_in_dim(w_EDF, e, keepdims=False).astype(jnp.float32)

    def multiply(block: Block, out_RJ: jax.Array) -> jax.Array:
      product_bJ = jax.lax.dot_general(block.rows(x_RI).astype(jnp.float32), w, (((1,), (summed,)), ((), ())))
      if scales:
        product_bJ = product_bJ * block.rows(scales[0])[:, None] * scales[1][e][None]
      return block.put(out_RJ, product_bJ)

    return blocks.fold(multiply, ends_E[e] - group_sizes_E[e], ends_E[e], out_RJ)

  start_RJ = jnp.zeros((len(x_RI), J), dtype or x_RI.dtype)
  return jax.lax.fori_loop(0, jnp.sum(group_sizes_E > 0), expert, start_RJ)


def tgmm(
  x_RD: jax.Array,
  y_RF: jax.Array,
  group_sizes_E: jax.Array,
  *scales: jax.Array,
  dtype: jnp.dtype,
  types: tuple[jnp.dtype, jnp.dtype] | None = None,
) -> jax.Array:
  """Returns out_EDF: for each group its rows of x, transposed, times its rows of y. Zeros for an empty group. With
  `types`, x and y are rounded to these at `scales`, [E, D] and [E, F]."""
  if types:
    x_RD = rounded_groups(x_RD, scales[0], group_sizes_E, types[0])
    y_RF = rounded_groups(y_RF, scales[1], group_sizes_E, types[1])
  E = len(group_sizes_E)
  blocks = row_blocks(len(x_RD), E)
  ends_E = jnp.cumsum(group_sizes_E)

  def product(block: Block) -> tuple[tuple, jax.Array]:
    x_bD, y_bF = (block.own_rows(a_RX).astype(jnp.float32) for a_RX in (x_RD, y_RF))
    return (), jax.lax.dot_general(x_bD, y_bF, (((0,), (0,)), ((), ())))

  def expert(e: jax.Array, out_EDF: jax.Array) -> jax.Array:
    _, sum_DF = blocks.sum(product, ends_E[e] - group_sizes_E[e], ends_E[e], ())
    if scales:
      sum_DF = sum_DF * scales[0][e][:, None] * scales[1][e][None]
    return jax.lax.dynamic_update_index_in_dim(out_EDF, sum_DF.astype(dtype), e, axis=0)

  return jax.lax.fori_loop(0, E, expert, jnp.zeros((E, x_RD.shape[1], y_RF.shape[1]), dtype))


def largest(x_RD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
  """Returns out_ED: the largest absolute value of each column in the rows of each group, in float32; zeros for an empty
  group."""
  E, D = len(group_sizes_E), x_RD.shape[1]
  blocks = row_blocks(len(x_RD), E)
  ends_E = jnp.cumsum(group_sizes_E)

  def maximum(block: Block, most_D: jax.Array) -> jax.Array:
    return jnp.maximum(most_D, jnp.max(jnp.abs(block.own_rows(x_RD).astype(jnp.float32)), axis=0))

  def expert(e: jax.Array, out_ED: jax.Array) -> jax.Array:
    most_D = blocks.fold(maximum, ends_E[e] - group_sizes_E[e], ends_E[e], jnp.zeros(D, jnp.float32))
    return jax.lax.dynamic_update_index_in_dim(out_ED, most_D, e, axis=0)

  return jax.lax.fori_loop(0, E, expert, jnp.zeros((E, D), jnp.float32))
