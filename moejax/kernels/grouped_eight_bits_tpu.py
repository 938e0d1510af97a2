"""Grouped matrix products of 8-bit operands on TPU, as Pallas kernels that multiply by the scales where they store.

R routed rows  E experts  D embed  F hidden  I contracted dimension  J other dimension  Z = visits of row tiles

D and F may be either way round. A lower-case letter is the size of one tile, and o is one row.

Megablox, which the other products use, takes no 8-bit operands; these kernels take its order of visits. The rows of a
gradient of weights are rounded by kernels that know their expert, for which XLA would gather scales [R, D]: once before
the product, unless the product reads them so few times that rounding them there costs less. Tiles of 8 bits are
32 x 128, so that every dimension is padded to multiples of 128.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

from moejax.kernels.eight_bits import sum_dtype, to_eight_bits
from moejax.kernels.grouped_matmul_tpu import Tiles, gmm_tiles, row_tile, tgmm_tiles

Ref = Any
"""A reference of Pallas to an array in memory, for which JAX has no public type."""

LANES = 128

ROUNDING_OPERATIONS = 4
"""Vector operations to round one value: a product, two comparisons and a cast."""

MASK_OPERATIONS = 3
"""Vector operations to mask one value of 8 bits: a selection, and casts to 32 bits and back."""

MOST_ROUNDED = 2
"""How many times `tgmm` rounds an operand itself. A pass before it moves 3 bytes for each value, which on every chip
takes as long as at least 1.8 times ROUNDING_OPERATIONS."""


def gmm(
  x_RI: jax.Array,
  w_EDF: jax.Array,
  group_sizes_E: jax.Array,
  x_scales_R: jax.Array,
  w_scales_EJ: jax.Array,
  *,
  transpose_w: bool,
  dtype: jnp.dtype,
  interpret: bool = False,
) -> jax.Array:
  """Returns out_RJ: the rows of each group times the matrix of its expert, or times its transpose, times the scales."""
  R, J = len(x_RI), w_EDF.shape[1 if transpose_w else 2]
  E = len(w_EDF)
  r = row_tile(R, E)
  x_RI, w_EDF = _padded(x_RI, r, LANES), _padded(w_EDF, 1, LANES, LANES)
  (padded_R, I), padded_J = x_RI.shape, w_EDF.shape[1 if transpose_w else 2]
  r, i, j = gmm_tiles(R, E, I, padded_J, 1, out_itemsize=dtype.itemsize)
  visits, count = _visits(group_sizes_E, padded_R, r, empty=False)
  i_count = I // i

  def kernel(visits: Any, x_ri: Ref, w: Ref, x_scales_or: Ref, w_scales_oj: Ref, out_rj: Ref, sum_rj: Ref) -> None:
    z, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
      sum_rj[...] = jnp.zeros_like(sum_rj)

    contracted = ((1,), (1 if transpose_w else 0,))
    sum_rj[...] += jax.lax.dot_general(x_ri[...], w[...], (contracted, ((), ())), preferred_element_type=sum_rj.dtype)

    @pl.when(step == i_count - 1)
    def _() -> None:
      start, end = _rows_of(visits, z, r)
      for first in range(0, r, LANES):
        rows = slice(first, first + LANES)
        scaled = sum_rj[rows].astype(jnp.float32) * _column(x_scales_or[:, rows]) * w_scales_oj[...]
        own = _is_own(first, (LANES, j), start, end)
        out_rj[rows] = jnp.where(own, scaled, out_rj[rows].astype(jnp.float32)).astype(dtype)

  of_w = (lambda n, z, k, v: (v[1][z], n, k)) if transpose_w else (lambda n, z, k, v: (v[1][z], k, n))
  out_RJ = pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((padded_R, padded_J), dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(pl.cdiv(padded_J, j), count, i_count),
      in_specs=[
        pl.BlockSpec((r, i), lambda n, z, k, v: (v[2][z], k)),
        pl.BlockSpec((None, j, i) if transpose_w else (None, i, j), of_w),
        pl.BlockSpec((1, r), lambda n, z, k, v: (0, v[2][z])),
        pl.BlockSpec((None, 1, j), lambda n, z, k, v: (v[1][z], 0, n)),
      ],
      out_specs=pl.BlockSpec((r, j), lambda n, z, k, v: (v[2][z], n)),
      scratch_shapes=[pltpu.VMEM((r, j), sum_dtype(x_RI.dtype))],
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
    cost_estimate=gmm_cost(R, E, I, J, dtype.itemsize),
    interpret=interpret,
    name="gmm_8bit",
  )(visits, x_RI, w_EDF, _padded(x_scales_R[None], 1, r), _padded(w_scales_EJ[:, None], 1, 1, LANES))
  # Tiles without a row of any group are never written and contain arbitrary values.
  return jnp.where(jnp.arange(R)[:, None] < jnp.sum(group_sizes_E), out_RJ[:R, :J], 0)


def gmm_cost(R: int, E: int, I: int, J: int, out_itemsize: int) -> pl.CostEstimate:
  """What `gmm` computes and moves, with its padding."""
  r, padded_I, padded_J = row_tile(R, E), _whole(I, LANES), _whole(J, LANES)
  padded_R = _whole(R, r)
  _, i, j = gmm_tiles(R, E, padded_I, padded_J, 1, out_itemsize=out_itemsize)
  matrices = E if i == padded_I else padded_R // r + E - 1  # one for each visit, if the summed dimension is split
  return pl.CostEstimate(
    flops=2 * padded_R * padded_I * padded_J,
    transcendentals=0,
    bytes_accessed=padded_R * padded_I * pl.cdiv(padded_J, j)
    + matrices * padded_I * padded_J
    + padded_R * padded_J * out_itemsize,
  )


def tgmm(
  x_RD: jax.Array,
  y_RF: jax.Array,
  group_sizes_E: jax.Array,
  x_scales_ED: jax.Array,
  y_scales_EF: jax.Array,
  *,
  types: tuple[jnp.dtype, jnp.dtype],
  dtype: jnp.dtype,
  interpret: bool = False,
) -> jax.Array:
  """Returns out_EDF: for each group its rows of x, transposed, times its rows of y, both rounded to their 8-bit types
  at the scales of the group, times the scales. Zeros for an empty group."""
  R, D, F, E = len(x_RD), x_RD.shape[1], y_RF.shape[1], len(group_sizes_E)
  itemsize = max(x_RD.dtype.itemsize, y_RF.dtype.itemsize)
  (r, d, f), (reads_x, reads_y) = _tgmm_tiles(R, E, D, F, itemsize, dtype.itemsize)
  x, y = _padded(x_RD, r, LANES), _padded(y_RF, r, LANES)
  (padded_R, padded_D), padded_F = x.shape, y.shape[1]
  if reads_x > MOST_ROUNDED:
    x = rounded_rows(x_RD, group_sizes_E, x_scales_ED, types[0], transpose=True, interpret=interpret)
  if reads_y > MOST_ROUNDED:
    y = rounded_rows(y_RF, group_sizes_E, y_scales_EF, types[1], transpose=False, interpret=interpret)
  visits, count = _visits(group_sizes_E, padded_R, r, empty=True)

  def kernel(visits: Any, x: Ref, y_rf: Ref, x_scales_od: Ref, y_scales_of: Ref, out_df: Ref, sum_df: Ref) -> None:
    z = pl.program_id(2)

    @pl.when(_is_first(visits, z))
    def _() -> None:
      sum_df[...] = jnp.zeros_like(sum_df)

    start, end = _rows_of(visits, z, r)

    def add(rows: Rows | None = None) -> None:
      x_dr = _eight_bits(x, x_scales_od, types[0], True, rows)
      y_8 = _eight_bits(y_rf, y_scales_of, types[1], False, rows)
      sum_df[...] += jax.lax.dot(x_dr, y_8, preferred_element_type=sum_df.dtype)

    is_whole = (start <= 0) & (r <= end)

    @pl.when(is_whole)
    def _() -> None:
      add()

    @pl.when((start < end) & ~is_whole)
    def _() -> None:
      add((start, end))  # both operands are masked, since rows of other groups may be infinite

    @pl.when(_is_last(visits, z, pl.num_programs(2)))
    def _() -> None:
      for first in range(0, d, LANES):
        rows = slice(first, first + LANES)
        scaled = sum_df[rows].astype(jnp.float32) * _column(x_scales_od[:, rows]) * y_scales_of[...]
        out_df[rows] = scaled.astype(dtype)

  of_x = ((r, d), lambda n, m, z, v: (v[2][z], m)) if x.dtype != types[0] else ((d, r), lambda n, m, z, v: (m, v[2][z]))
  out_EDF = pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((E, padded_D, padded_F), dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(pl.cdiv(padded_F, f), pl.cdiv(padded_D, d), count),
      in_specs=[
        pl.BlockSpec(*of_x),
        pl.BlockSpec((r, f), lambda n, m, z, v: (v[2][z], n)),
        pl.BlockSpec((None, 1, d), lambda n, m, z, v: (v[1][z], 0, m)),
        pl.BlockSpec((None, 1, f), lambda n, m, z, v: (v[1][z], 0, n)),
      ],
      out_specs=pl.BlockSpec((None, d, f), lambda n, m, z, v: (v[1][z], m, n)),
      scratch_shapes=[pltpu.VMEM((d, f), sum_dtype(types[0]))],
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
    cost_estimate=tgmm_cost(R, E, D, F, itemsize, dtype.itemsize),
    interpret=interpret,
    name="tgmm_8bit",
  )(visits, x, y, *(_padded(a[:, None], 1, 1, LANES) for a in (x_scales_ED, y_scales_EF)))
  return out_EDF[:, :D, :F]


Rows = tuple[jax.Array, jax.Array]
"""The first of some rows of a tile, and that after the last."""


def _eight_bits(a: Ref, scales_o: Ref, dtype: jnp.dtype, transpose: bool, rows: Rows | None) -> jax.Array:
  """An operand of `tgmm` in 8 bits, transposed if `transpose`, which it already is if it was rounded before. With
  `rows`, all others are 0."""
  rounds = a.dtype != dtype
  if not rounds and rows is None:
    return a[...]
  wide = a[...].astype(jnp.float32) * (1 / scales_o[...]) if rounds else a[...].astype(sum_dtype(dtype))
  if rows is not None:
    own = _is_own(0, a.shape, *rows, axis=1 if transpose and not rounds else 0)
    wide = jnp.where(own, wide, jnp.zeros_like(wide))
  return to_eight_bits(wide.swapaxes(0, 1) if transpose else wide, dtype) if rounds else wide.astype(dtype)


def _tgmm_tiles(R: int, E: int, D: int, F: int, itemsize: int, out_itemsize: int) -> tuple[Tiles, tuple[int, int]]:
  """The tiles of `tgmm`, and how many times it reads x and y."""
  D, F = _whole(D, LANES), _whole(F, LANES)
  r, d, f = tgmm_tiles(R, E, D, F, itemsize, out_itemsize)
  return (r, d, f), (pl.cdiv(F, f), pl.cdiv(D, d))


def tgmm_cost(R: int, E: int, D: int, F: int, itemsize: int, out_itemsize: int) -> pl.CostEstimate:
  """What `tgmm` computes and moves, with its padding, after operands that it does not round itself are rounded."""
  (r, *_), reads = _tgmm_tiles(R, E, D, F, itemsize, out_itemsize)
  rows, widths = _whole(R, r), (_whole(D, LANES), _whole(F, LANES))
  masked = min(2 * E, rows // r + E - 1) * r  # the rows of the first and of the last tile of each group
  operations = moved = 0
  for width, times in zip(widths, reads, strict=True):
    rounds = times <= MOST_ROUNDED
    operations += times * width * (ROUNDING_OPERATIONS * rows if rounds else MASK_OPERATIONS * masked)
    moved += times * width * rows * (itemsize if rounds else 1)
  return pl.CostEstimate(
    flops=2 * rows * widths[0] * widths[1],
    transcendentals=operations,
    bytes_accessed=moved + E * widths[0] * widths[1] * out_itemsize,
  )


def bytes_before_tgmm(R: int, E: int, D: int, F: int, itemsize: int, out_itemsize: int) -> int:
  """Bytes of the passes that find the scales of its operands and, where `tgmm` does not, round them."""
  _, reads = _tgmm_tiles(R, E, D, F, itemsize, out_itemsize)
  rounded = [width for width, times in zip((D, F), reads, strict=True) if times > MOST_ROUNDED]
  return R * (D + F) * itemsize + sum(rounding_cost(R, E, width, itemsize).bytes_accessed for width in rounded)


def rounded_rows(
  x_RD: jax.Array,
  group_sizes_E: jax.Array,
  scales_ED: jax.Array,
  dtype: jnp.dtype,
  *,
  transpose: bool,
  interpret: bool = False,
) -> jax.Array:
  """Returns the rows of each group rounded at its scales, with both dimensions padded, as [R, D] or, with `transpose`,
  as [D, R]. Rows of no group contain arbitrary values."""
  R, D = x_RD.shape
  r = row_tile(R, len(group_sizes_E))
  x_RD = _padded(x_RD, r, LANES)
  padded_R, padded_D = x_RD.shape
  d = _column_tile(padded_D)
  visits, count = _visits(group_sizes_E, padded_R, r, empty=False)

  def kernel(visits: Any, x_rd: Ref, scales_od: Ref, out: Ref, scaled_rd: Ref) -> None:
    # A tile that several groups share is written again, with the rows of one more group, before it leaves VMEM.
    own = _is_own(0, (r, d), *_rows_of(visits, pl.program_id(1), r))
    scaled_rd[...] = jnp.where(own, x_rd[...].astype(jnp.float32) * (1 / scales_od[...]), scaled_rd[...])
    out[...] = to_eight_bits(scaled_rd[...].swapaxes(0, 1) if transpose else scaled_rd[...], dtype)

  of_out = ((d, r), lambda m, z, v: (m, v[2][z])) if transpose else ((r, d), lambda m, z, v: (v[2][z], m))
  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((padded_D, padded_R) if transpose else (padded_R, padded_D), dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(padded_D // d, count),
      in_specs=[
        pl.BlockSpec((r, d), lambda m, z, v: (v[2][z], m)),
        pl.BlockSpec((None, 1, d), lambda m, z, v: (v[1][z], 0, m)),
      ],
      out_specs=pl.BlockSpec(*of_out),
      scratch_shapes=[pltpu.VMEM((r, d), jnp.float32)],
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    cost_estimate=rounding_cost(R, len(group_sizes_E), D, x_RD.dtype.itemsize),
    interpret=interpret,
    name="rounded_rows",
  )(visits, x_RD, _padded(scales_ED[:, None], 1, 1, LANES))


def rounding_cost(R: int, E: int, D: int, itemsize: int) -> pl.CostEstimate:
  """What `rounded_rows` computes and moves, with its padding."""
  r = row_tile(R, E)
  rows, columns = _whole(R, r), _whole(D, LANES)
  return pl.CostEstimate(
    flops=0,
    transcendentals=ROUNDING_OPERATIONS * (rows + (E - 1) * r) * columns,
    bytes_accessed=rows * columns * (itemsize + 1),
  )


def largest(x_RD: jax.Array, group_sizes_E: jax.Array, *, interpret: bool = False) -> jax.Array:
  """Returns out_ED: the largest absolute value of each column in the rows of each group, in float32; zeros for an empty
  group."""
  R, D, E = len(x_RD), x_RD.shape[1], len(group_sizes_E)
  r = row_tile(R, E)
  x_RD = _padded(x_RD, r, LANES)
  padded_R, padded_D = x_RD.shape
  d = _column_tile(padded_D)
  visits, count = _visits(group_sizes_E, padded_R, r, empty=True)

  def kernel(visits: Any, x_rd: Ref, out_od: Ref) -> None:
    z = pl.program_id(1)
    start, end = _rows_of(visits, z, r)

    @pl.when(_is_first(visits, z))
    def _() -> None:
      out_od[...] = jnp.zeros_like(out_od)

    own = _is_own(0, (r, d), start, end)
    sizes_rd = jnp.where(own, jnp.abs(x_rd[...].astype(jnp.float32)), 0.0)
    out_od[...] = jnp.maximum(out_od[...], jnp.max(sizes_rd, axis=0, keepdims=True))

  out_EoD = pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((E, 1, padded_D), jnp.float32),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(padded_D // d, count),
      in_specs=[pl.BlockSpec((r, d), lambda m, z, v: (v[2][z], m))],
      out_specs=pl.BlockSpec((None, 1, d), lambda m, z, v: (v[1][z], 0, m)),
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    cost_estimate=pl.CostEstimate(
      flops=0, transcendentals=3 * x_RD.size, bytes_accessed=x_RD.size * x_RD.dtype.itemsize
    ),
    interpret=interpret,
    name="largest",
  )(visits, x_RD)
  return out_EoD[:, 0, :D]


Visits = tuple[jax.Array, jax.Array, jax.Array]
"""The first row of each expert and the end of the last [E + 1], and the expert and the row tile of each visit [Z]."""


def _visits(group_sizes_E: jax.Array, R: int, r: int, empty: bool) -> tuple[Visits, jax.Array]:
  """The visits in order, and their number. `empty` adds one visit of each group without rows."""
  return make_group_metadata(
    group_sizes=group_sizes_E, m=R, tm=r, start_group=jnp.zeros((), jnp.int32),
    num_nonzero_groups=len(group_sizes_E), visit_empty_groups=empty,
  )  # fmt: skip


def _rows_of(visits: Visits, z: jax.Array, r: int) -> tuple[jax.Array, jax.Array]:
  """The rows of a visit's expert, relative to the first row of its tile: from the first one to before the second."""
  starts, experts_Z, tiles_Z = visits
  return starts[experts_Z[z]] - tiles_Z[z] * r, starts[experts_Z[z] + 1] - tiles_Z[z] * r


def _is_first(visits: Visits, z: jax.Array) -> jax.Array:
  """Whether a visit is the first of its expert."""
  return (z == 0) | (visits[1][z] != visits[1][jnp.maximum(z - 1, 0)])


def _is_last(visits: Visits, z: jax.Array, count: jax.Array | int) -> jax.Array:
  """Whether a visit is the last of its expert."""
  return (z == count - 1) | (visits[1][z] != visits[1][jnp.minimum(z + 1, count - 1)])


def _is_own(first: int, shape: tuple[int, ...], start: jax.Array, end: jax.Array, axis: int = 0) -> jax.Array:
  """Marks the rows from `start` to `end` of a part of a tile that starts at row `first`. Rows are dimension `axis`."""
  row = first + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
  return (start <= row) & (row < end)


def _column(row: jax.Array) -> jax.Array:
  """Turns [1, 128] into [128, 1]. The units for transposes take squares."""
  return jnp.broadcast_to(row, (LANES, LANES)).swapaxes(0, 1)[:, :1]


def _column_tile(D: int) -> int:
  """The largest tile of up to 1024 columns that divides D."""
  return max(size for size in range(LANES, min(D, 8 * LANES) + 1, LANES) if D % size == 0)


def _padded(a: jax.Array, *multiples: int) -> jax.Array:
  """Pads each dimension with zeros to a multiple."""
  ones = (1,) * (a.ndim - len(multiples))
  return jnp.pad(a, [(0, -size % multiple) for size, multiple in zip(a.shape, (*ones, *multiples), strict=True)])


def _whole(size: int, multiple: int) -> int:
  """The size with padding."""
  return size + -size % multiple
