"""Grouped matrix products as loops over experts and blocks of rows, in plain JAX: fast on CPU, and correct on any
platform.

R routed rows  E experts  D embed  F hidden  I contracted dimension  J other dimension

D and F may be either way round. b is the number of rows of one block.

The loops visit only rows of groups, so that an uneven load costs only the partly filled last blocks of each group. The
matrix of an expert is read from the stack once for all of its blocks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.kernels.eight_bits import rounded_groups


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
  R, E = len(x_RI), len(w_EDF)
  ends_E = jnp.cumsum(group_sizes_E)

  # Those with rows come first, and only they are visited.
  experts_E = jnp.argsort(group_sizes_E == 0, stable=True)

  def expert(i: jax.Array, out_RJ: jax.Array) -> jax.Array:
    e = experts_E[i]
    w = jax.lax.dynamic_index_in_dim(w_EDF, e, keepdims=False).astype(jnp.float32)

    def block(start: jax.Array, own_b: jax.Array, out_RJ: jax.Array) -> jax.Array:
      x_bK = _rows(x_RI, start, len(own_b))
      product_bN = jax.lax.dot_general(x_bK.astype(jnp.float32), w, (((1,), (summed,)), ((), ())))
      if scales:
        product_bN = product_bN * _rows(scales[0], start, len(own_b))[:, None] * scales[1][e][None]
      # The other rows of the block belong to another expert or to none.
      out_bN = jnp.where(own_b[:, None], product_bN.astype(out_RJ.dtype), _rows(out_RJ, start, len(own_b)))
      return jax.lax.dynamic_update_slice_in_dim(out_RJ, out_bN, start, axis=0)

    return _over_blocks(block, R, _block_sizes(R, E), ends_E[e] - group_sizes_E[e], ends_E[e], out_RJ)

  return jax.lax.fori_loop(0, jnp.sum(group_sizes_E > 0), expert, jnp.zeros((R, J), dtype or x_RI.dtype))


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
  R, E = len(x_RD), len(group_sizes_E)
  large, small = sizes = _block_sizes(R, E)
  ends_E = jnp.cumsum(group_sizes_E)

  def block(start: jax.Array, own_b: jax.Array) -> jax.Array:
    # Both operands are masked, since rows of other groups may be infinite.
    x_bD, y_bF = (jnp.where(own_b[:, None], _rows(a, start, len(own_b)), 0).astype(jnp.float32) for a in (x_RD, y_RF))
    return jax.lax.dot_general(x_bD, y_bF, (((0,), (0,)), ((), ())))

  def expert(e: jax.Array, out_EDF: jax.Array) -> jax.Array:
    end, size = ends_E[e], group_sizes_E[e]
    # The first block starts the sum: zeros to add to would cost another pass over [D, F].
    first_DF = jax.lax.cond(
      _large_blocks(size, sizes) > 0,
      lambda: block(*_place(R, large, end - size, end)),
      lambda: block(*_place(R, small, end - size, end)),
    )
    start = jnp.minimum(end - size + jnp.where(_large_blocks(size, sizes) > 0, large, small), end)
    sum_DF = _over_blocks(lambda start, own_b, sum_DF: sum_DF + block(start, own_b), R, sizes, start, end, first_DF)
    if scales:
      sum_DF = sum_DF * scales[0][e][:, None] * scales[1][e][None]
    return jax.lax.dynamic_update_index_in_dim(out_EDF, sum_DF.astype(dtype), e, axis=0)

  return jax.lax.fori_loop(0, E, expert, jnp.zeros((E, x_RD.shape[1], y_RF.shape[1]), dtype))


def largest(x_RD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
  """Returns out_ED: the largest absolute value of each column in the rows of each group, in float32; zeros for an empty
  group."""
  R, E = len(x_RD), len(group_sizes_E)
  ends_E = jnp.cumsum(group_sizes_E)

  def block(start: jax.Array, own_b: jax.Array, most_D: jax.Array) -> jax.Array:
    sizes_bD = jnp.abs(_rows(x_RD, start, len(own_b)).astype(jnp.float32))
    return jnp.maximum(most_D, jnp.max(jnp.where(own_b[:, None], sizes_bD, 0), axis=0))

  def expert(e: jax.Array, out_ED: jax.Array) -> jax.Array:
    start, none_D = ends_E[e] - group_sizes_E[e], jnp.zeros(x_RD.shape[1], jnp.float32)
    most_D = _over_blocks(block, R, _block_sizes(R, E), start, ends_E[e], none_D)
    return jax.lax.dynamic_update_index_in_dim(out_ED, most_D, e, axis=0)

  return jax.lax.fori_loop(0, E, expert, jnp.zeros((E, x_RD.shape[1]), jnp.float32))


def _block_sizes(R: int, E: int) -> tuple[int, int]:
  """Rows of a block, and of the smaller blocks for the rest of a group.

  A block has the mean size of a group, rounded to a power of two within bounds: products of fewer than 32 rows are not
  cheaper, and those of more than 512 rows are not faster per row. The smaller blocks have an eighth of that, but at
  least 32 rows, since small blocks waste fewer rows, but each costs a pass over [D, F].
  """
  large = min(max(1 << max(R // E, 1).bit_length() - 1, 128), 512)
  return min(large, R), min(max(large // 8, 32), R)


def _large_blocks(rows: jax.Array, sizes: tuple[int, int]) -> jax.Array:
  """The number of large blocks for so many rows. The last one may lack up to a quarter of its rows, since small blocks
  would compute the others in six passes or more (three if the large block has 128 rows)."""
  large, _ = sizes
  return (rows + large // 4) // large


def _over_blocks(
  block: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
  R: int,
  sizes: tuple[int, int],
  start: jax.Array,
  end: jax.Array,
  carry: jax.Array,
) -> jax.Array:
  """Applies `block` to the rows from `start` to `end`: large blocks, then small ones for the rest."""
  large, small = sizes
  count = _large_blocks(end - start, sizes)
  rest = jnp.minimum(start + count * large, end)
  carry = jax.lax.fori_loop(0, count, lambda i, carry: block(*_place(R, large, start + i * large, end), carry), carry)
  return jax.lax.fori_loop(
    0, (end - rest + small - 1) // small, lambda i, carry: block(*_place(R, small, rest + i * small, end), carry), carry
  )


def _place(R: int, b: int, first: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The start of a block of b rows within R that contains the rows from `first`, and own_b, which marks those rows."""
  start = jnp.minimum(first, R - b)
  rows_b = start + jnp.arange(b, dtype=jnp.int32)
  return start, (first <= rows_b) & (rows_b < end)


def _rows(x_RI: jax.Array, start: jax.Array, b: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x_RI, start, b, axis=0)
