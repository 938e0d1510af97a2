"""Grouped matrix products on GPU: two Triton kernels, written in Pallas.

R routed rows  E experts  D embed  F hidden  X = D or F  I contracted dimension  J other dimension
Z = row tiles of all groups

D and F may be either way round. A lower-case letter is the size of one tile.

The first row tile of a group starts where the group starts, so that no row is computed for two groups. Rows of other
groups are masked. A tile that would extend beyond R starts earlier, and masks the rows before its own. Rows of no group
are tiles as well, into which `gmm` writes zeros.

Pallas multiplies operands of one type. An e4m3 and an e5m2 operand, of the products of the backward pass, are read as 8
bits and multiplied in bfloat16, which holds their values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moejax.kernels.eight_bits import rounded_groups, sum_dtype

Ref = Any
"""A reference of Pallas to an array in memory, for which JAX has no public type."""

TILE = 128
"""The largest number of rows and columns of an output tile."""

DEPTH = 32
"""Elements that a tensor core sums at once of 8 bits; of wider types they are fewer."""

TILE_BYTES = 128
"""Bytes of one row of an operand's tile: 128 of 8 bits, 64 bfloat16 or 32 float32."""

COMPILER_PARAMS = plgpu.CompilerParams(num_warps=8, num_stages=3)
"""Three stages of two operand tiles take 96 KiB of shared memory, which every data-center GPU has."""


def gmm(
  x_RI: jax.Array,
  w_EDF: jax.Array,
  group_sizes_E: jax.Array,
  *scales: jax.Array,
  transpose_w: bool,
  dtype: jnp.dtype | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Returns out_RJ: the rows of each group times the matrix of its expert, or times its transpose. 8-bit operands have
  `scales`, [R] and [E, J]."""
  R, dtype, operands = len(x_RI), dtype or x_RI.dtype, x_RI.dtype
  J = w_EDF.shape[1 if transpose_w else 2]
  if scales:
    scales = _enough_rows(scales[0]), _aligned(scales[1], 1)
  else:
    operands = jnp.promote_types(x_RI.dtype, w_EDF.dtype)
    x_RI, w_EDF = x_RI.astype(operands), w_EDF.astype(operands)
  x_RI, w_EDF = _aligned(_enough_rows(x_RI), 1), _aligned(w_EDF, 1, 2)
  padded_R, I = x_RI.shape
  padded_J = w_EDF.shape[1 if transpose_w else 2]
  r, i, j = _row_tile(padded_R, len(w_EDF)), _tile(I, TILE_BYTES // operands.itemsize), _tile(padded_J, TILE)
  experts_Z, starts_Z, ends_Z = _visits(group_sizes_E, padded_R, r)
  out_RJ = pl.pallas_call(
    functools.partial(_gmm_kernel, r=r, i=i, j=j, transpose_w=transpose_w),
    # Columns are the fastest axis, so that concurrent programs share rows and the weights of few experts in L2.
    grid=(padded_J // j, len(experts_Z)),
    out_shape=jax.ShapeDtypeStruct((padded_R, padded_J), dtype),
    compiler_params=COMPILER_PARAMS,
    interpret=interpret,
    name="gmm",
  )(experts_Z, starts_Z, ends_Z, x_RI, w_EDF, *scales)
  return out_RJ[:R, :J]


def _gmm_kernel(
  experts_Z: Ref,
  starts_Z: Ref,
  ends_Z: Ref,
  x_RI: Ref,
  w_EDF: Ref,
  *scales_and_out: Ref,
  r: int,
  i: int,
  j: int,
  transpose_w: bool,
) -> None:
  """Computes one tile of the output: the rows of one row tile and j columns."""
  *scales, out_RJ = scales_and_out
  columns, z = pl.ds(pl.program_id(0) * j, j), pl.program_id(1)
  e, start, end = experts_Z[z], starts_Z[z], ends_Z[z]
  R, I = x_RI.shape
  first = jnp.minimum(start, R - r)
  own_r1 = _own_rows(first, r, start, end)
  is_group = e < w_EDF.shape[0]

  @pl.when((start < end) & ~is_group)
  def _() -> None:
    plgpu.store(out_RJ.at[pl.ds(first, r), columns], jnp.zeros((r, j), out_RJ.dtype), mask=own_r1)

  @pl.when((start < end) & is_group)
  def _() -> None:
    def add(step: jax.Array, sum_rj: jax.Array) -> jax.Array:
      summed = pl.ds(step * i, i)
      x_ri = plgpu.load(x_RI.at[pl.ds(first, r), summed])
      w = plgpu.load(w_EDF.at[e, columns, summed] if transpose_w else w_EDF.at[e, summed, columns])
      return sum_rj + plgpu.dot(*_alike(x_ri, w), trans_b=transpose_w)

    sum_rj = jax.lax.fori_loop(0, I // i, add, jnp.zeros((r, j), sum_dtype(x_RI.dtype)))
    if scales:
      of_rows_r, of_columns_j = plgpu.load(scales[0].at[pl.ds(first, r)]), plgpu.load(scales[1].at[e, columns])
      sum_rj = sum_rj.astype(jnp.float32) * of_rows_r[:, None] * of_columns_j[None, :]
    plgpu.store(out_RJ.at[pl.ds(first, r), columns], sum_rj.astype(out_RJ.dtype), mask=own_r1)


def tgmm(
  x_RD: jax.Array,
  y_RF: jax.Array,
  group_sizes_E: jax.Array,
  *scales: jax.Array,
  dtype: jnp.dtype,
  types: tuple[jnp.dtype, jnp.dtype] | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Returns out_EDF: for each group its rows of x, transposed, times its rows of y. Zeros for an empty group. With
  `types`, x and y are rounded to these at `scales`, [E, D] and [E, F]."""
  D, F, E, operands = x_RD.shape[1], y_RF.shape[1], len(group_sizes_E), jnp.promote_types(x_RD.dtype, y_RF.dtype)
  if types:
    x_RD = rounded_groups(x_RD, scales[0], group_sizes_E, types[0])
    y_RF = rounded_groups(y_RF, scales[1], group_sizes_E, types[1])
    operands, scales = types[0], (_aligned(scales[0], 1), _aligned(scales[1], 1))
  else:
    x_RD, y_RF = x_RD.astype(operands), y_RF.astype(operands)
  x_RD, y_RF = (_aligned(_enough_rows(rows_RX), 1) for rows_RX in (x_RD, y_RF))
  padded_D, padded_F = x_RD.shape[1], y_RF.shape[1]
  r, d, f = _below(len(x_RD), TILE_BYTES // operands.itemsize), _tile(padded_D, TILE), _tile(padded_F, TILE)
  ends_E = jnp.cumsum(group_sizes_E)
  out_EDF = pl.pallas_call(
    functools.partial(_tgmm_kernel, r=r, d=d, f=f),
    grid=(padded_D // d, padded_F // f, E),
    out_shape=jax.ShapeDtypeStruct((E, padded_D, padded_F), dtype),
    compiler_params=COMPILER_PARAMS,
    interpret=interpret,
    name="tgmm",
  )(ends_E - group_sizes_E, ends_E, x_RD, y_RF, *scales)
  return out_EDF[:, :D, :F]


def _tgmm_kernel(
  starts_E: Ref, ends_E: Ref, x_RD: Ref, y_RF: Ref, *scales_and_out: Ref, r: int, d: int, f: int
) -> None:
  """Computes one tile of the output of one expert, summed over the rows of its group."""
  *scales, out_EDF = scales_and_out
  rows_d, columns_f, e = pl.ds(pl.program_id(0) * d, d), pl.ds(pl.program_id(1) * f, f), pl.program_id(2)
  start, end = starts_E[e], ends_E[e]

  def add(i: jax.Array, sum_df: jax.Array) -> jax.Array:
    wanted = start + i * r
    first = jnp.minimum(wanted, x_RD.shape[0] - r)
    # Both operands are masked, since rows of other groups may be infinite.
    own_r1 = _own_rows(first, r, wanted, end)
    x_rd = plgpu.load(x_RD.at[pl.ds(first, r), rows_d], mask=own_r1, other=jnp.zeros((), x_RD.dtype))
    y_rf = plgpu.load(y_RF.at[pl.ds(first, r), columns_f], mask=own_r1, other=jnp.zeros((), y_RF.dtype))
    return sum_df + plgpu.dot(*_alike(x_rd, y_rf), trans_a=True)

  sum_df = jax.lax.fori_loop(0, pl.cdiv(end - start, r), add, jnp.zeros((d, f), sum_dtype(x_RD.dtype)))
  if scales:
    of_rows_d, of_columns_f = plgpu.load(scales[0].at[e, rows_d]), plgpu.load(scales[1].at[e, columns_f])
    sum_df = sum_df.astype(jnp.float32) * of_rows_d[:, None] * of_columns_f[None, :]
  plgpu.store(out_EDF.at[e, rows_d, columns_f], sum_df.astype(out_EDF.dtype))


def largest(x_RD: jax.Array, group_sizes_E: jax.Array, *, interpret: bool = False) -> jax.Array:
  """Returns out_ED: the largest absolute value of each column in the rows of each group, in float32; zeros for an empty
  group."""
  D, E = x_RD.shape[1], len(group_sizes_E)
  x_RD = _aligned(_enough_rows(x_RD), 1)
  R, padded_D = x_RD.shape
  r, d = _below(R, TILE), _tile(padded_D, TILE)
  ends_E = jnp.cumsum(group_sizes_E)
  out_ED = pl.pallas_call(
    functools.partial(_largest_kernel, r=r, d=d),
    grid=(padded_D // d, E),
    out_shape=jax.ShapeDtypeStruct((E, padded_D), jnp.float32),
    compiler_params=COMPILER_PARAMS,
    interpret=interpret,
    name="largest",
  )(ends_E - group_sizes_E, ends_E, x_RD)
  return out_ED[:, :D]


def _largest_kernel(starts_E: Ref, ends_E: Ref, x_RD: Ref, out_ED: Ref, *, r: int, d: int) -> None:
  """Computes d columns of one group."""
  columns_d, e = pl.ds(pl.program_id(0) * d, d), pl.program_id(1)
  start, end = starts_E[e], ends_E[e]

  def more(i: jax.Array, most_d: jax.Array) -> jax.Array:
    wanted = start + i * r
    first = jnp.minimum(wanted, x_RD.shape[0] - r)
    own_r1 = _own_rows(first, r, wanted, end)
    x_rd = plgpu.load(x_RD.at[pl.ds(first, r), columns_d], mask=own_r1, other=jnp.zeros((), x_RD.dtype))
    # Maxima on GPU leave out NaN, which has to reach the results.
    sizes_rd = jnp.where(x_rd != x_rd, jnp.inf, jnp.abs(x_rd.astype(jnp.float32)))
    return jnp.maximum(most_d, jnp.max(sizes_rd, axis=0))

  plgpu.store(out_ED.at[e, columns_d], jax.lax.fori_loop(0, pl.cdiv(end - start, r), more, jnp.zeros(d, jnp.float32)))


def _alike(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Operands of one type: in bfloat16 if they are two types of 8 bits."""
  return (x, y) if x.dtype == y.dtype else (x.astype(jnp.bfloat16), y.astype(jnp.bfloat16))


def _visits(group_sizes_E: jax.Array, R: int, r: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Expert, first row and end of every row tile, of which the rows of no group, whose expert is E, come last. There are
  as many as the worst load needs; unused ones have no rows."""
  E = len(group_sizes_E)
  Z = R // r + E + 1  # each group has a partly filled tile at most, and the rows of no group too
  sizes = jnp.append(group_sizes_E, R - jnp.sum(group_sizes_E))
  tiles, ends = pl.cdiv(sizes, r), jnp.cumsum(sizes)
  experts_Z = jnp.repeat(jnp.arange(E + 1, dtype=jnp.int32), tiles, total_repeat_length=Z)
  tile_Z = jnp.arange(Z, dtype=jnp.int32) - (jnp.cumsum(tiles) - tiles)[experts_Z]
  starts_Z = (ends - sizes)[experts_Z] + tile_Z * r
  return experts_Z, starts_Z, jnp.clip(ends[experts_Z], starts_Z, starts_Z + r)


def _own_rows(first: jax.Array, r: int, start: jax.Array, end: jax.Array) -> jax.Array:
  """Returns own_r1, which marks the rows from `start` to `end` among the r rows from `first`."""
  rows_r1 = first + jnp.arange(r, dtype=jnp.int32)[:, None]
  return (start <= rows_r1) & (rows_r1 < end)


def _aligned(a: jax.Array, *axes: int) -> jax.Array:
  """Pads these dimensions with zeros to multiples of DEPTH."""
  return jnp.pad(a, [(0, -size % DEPTH if axis in axes else 0) for axis, size in enumerate(a.shape)])


def _enough_rows(a_RX: jax.Array) -> jax.Array:
  """Pads fewer rows than a tile needs. More rows are not copied, whatever their number."""
  return jnp.pad(a_RX, [(0, max(0, DEPTH - len(a_RX))), *[(0, 0)] * (a_RX.ndim - 1)])


def _tile(size: int, limit: int) -> int:
  """The largest power of two up to `limit` that divides `size`."""
  return min(size & -size, limit)


def _row_tile(R: int, E: int) -> int:
  """Rows of a tile of `gmm`: the mean size of a group, rounded to a power of two from 16 to TILE, at most R."""
  return min(_below(max(R // E, 16), TILE), _below(R, TILE))


def _below(size: int, limit: int) -> int:
  """The largest power of two that is at most `size` and `limit`."""
  return min(1 << size.bit_length() - 1, limit)
