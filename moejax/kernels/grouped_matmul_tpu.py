"""Grouped matrix products on TPU: megablox, which is part of JAX, with tiles chosen for the shapes.

R routed rows  E experts  D embed  F hidden  I contracted dimension  J other dimension

D and F may be either way round.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm as megablox_gmm
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm as megablox_tgmm

VMEM_BYTES = 12 * 2**20
"""Bytes of VMEM for the tiles of a kernel, of the 16 MiB that XLA allows by default."""

Tiles = tuple[int, int, int]
"""Rows, then the two dimensions of a weight: summed and other in `gmm`, D and F in `tgmm`."""


def gmm(
  x_RI: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, *, transpose_w: bool, interpret: bool = False
) -> jax.Array:
  """Returns out_RJ: the rows of each group times the matrix of its expert, or times its transpose."""
  (R, I), E, J = x_RI.shape, len(w_EDF), w_EDF.shape[1 if transpose_w else 2]
  tiles = gmm_tiles(R, E, I, J, max(x_RI.dtype.itemsize, w_EDF.dtype.itemsize))
  x_RI = _whole_tiles(x_RI, tiles)
  out_RJ = megablox_gmm(x_RI, w_EDF, group_sizes_E, x_RI.dtype, tiles, transpose_rhs=transpose_w, interpret=interpret)
  # Tiles without a row of any group are never written and contain arbitrary values.
  return jnp.where(jnp.arange(R)[:, None] < jnp.sum(group_sizes_E), out_RJ[:R], 0)


def tgmm(
  x_RD: jax.Array, y_RF: jax.Array, group_sizes_E: jax.Array, *, dtype: jnp.dtype, interpret: bool = False
) -> jax.Array:
  """Returns out_EDF: for each group its rows of x, transposed, times its rows of y. Zeros for an empty group."""
  (R, D), E, F = x_RD.shape, len(group_sizes_E), y_RF.shape[1]
  tiles = tgmm_tiles(R, E, D, F, max(x_RD.dtype.itemsize, y_RF.dtype.itemsize, dtype.itemsize))
  x_DR, y_RF = _whole_tiles(x_RD, tiles).swapaxes(0, 1), _whole_tiles(y_RF, tiles)
  return megablox_tgmm(x_DR, y_RF, group_sizes_E, dtype, tiles, interpret=interpret)


def gmm_tiles(R: int, E: int, I: int, J: int, itemsize: int, out_itemsize: int | None = None) -> Tiles:
  """Tiles that move the fewest elements between HBM and VMEM. With `out_itemsize`, that of the result alone, the summed
  dimension is a whole number of tiles, since a rest of 8 bits cannot be masked."""
  tile_R = row_tile(R, E)

  def held(tile_I: int, tile_J: int) -> int:
    result = (2 * (out_itemsize or itemsize) + 4) * tile_R * tile_J
    return 2 * itemsize * (tile_R * tile_I + tile_I * tile_J) + result

  moved = functools.partial(_gmm_moved, R, E, I, J)
  return tile_R, *_best(_splits(I, whole=out_itemsize is not None), _splits(J), moved, held)


def _gmm_moved(R: int, E: int, I: int, J: int, tile_I: int, tile_J: int) -> int:
  """Elements of both operands that `gmm` reads. A weight tile stays in VMEM while the row tiles of its group pass,
  unless I is split."""
  times = E if tile_I >= I else visits(R, E, row_tile(R, E))
  return R * I * _count(J, tile_J) + times * I * J


def gmm_bytes(R: int, E: int, I: int, J: int, itemsize: int, out_itemsize: int) -> int:
  """Bytes that `gmm` moves. Megablox declares more: the weight again for each row tile of a group."""
  _, tile_I, tile_J = gmm_tiles(R, E, I, J, itemsize)
  return itemsize * _gmm_moved(R, E, I, J, tile_I, tile_J) + out_itemsize * R * J


def tgmm_tiles(R: int, E: int, D: int, F: int, itemsize: int, out_itemsize: int | None = None) -> Tiles:
  """Tiles that move the fewest elements between HBM and VMEM. `out_itemsize` is that of the result alone."""
  tile_R = row_tile(R, E)

  def held(tile_D: int, tile_F: int) -> int:
    # Rows are masked in float32 before the product.
    masked = 4 * tile_R * (tile_D + tile_F)
    result = (2 * (out_itemsize or itemsize) + 4) * tile_D * tile_F
    return 2 * itemsize * (tile_R * tile_D + tile_R * tile_F) + result + masked

  return tile_R, *_best(_splits(D), _splits(F), functools.partial(_tgmm_moved, R, D, F), held)


def _tgmm_moved(R: int, D: int, F: int, tile_D: int, tile_F: int) -> int:
  """Elements of both operands that `tgmm` reads."""
  return R * D * _count(F, tile_F) + R * F * _count(D, tile_D)


def tgmm_bytes(R: int, E: int, D: int, F: int, itemsize: int, out_itemsize: int) -> int:
  """Bytes that `tgmm` moves."""
  _, tile_D, tile_F = tgmm_tiles(R, E, D, F, max(itemsize, out_itemsize))
  return itemsize * _tgmm_moved(R, D, F, tile_D, tile_F) + out_itemsize * E * D * F


def row_tile(R: int, E: int) -> int:
  """Rows of a tile: the most for which less than a tenth is computed twice at borders of groups, but at least 128.

  The matrix unit needs 128 cycles to load its weights, however many rows follow, so that tiles of fewer rows save FLOPs
  but not time. Groups with a mean size below 1280 rows therefore compute more than 1.1 times the ideal.
  """
  return next((rows for rows in (512, 256) if (E - 1) * rows <= 0.1 * R), 128)


def visits(R: int, E: int, tile_R: int) -> int:
  """The largest number of row tiles of a product: a tile in which another group starts counts again."""
  return _count(R, tile_R) + E - 1


def padding(R: int, E: int) -> float:
  """Rows that the matrix unit computes for each that is there: those of a tile count for every group in it. All rows
  are those of a group."""
  tile_R = row_tile(R, E)
  return visits(R, E, tile_R) * tile_R / R


def _best(
  one: list[int], other: list[int], moved: Callable[[int, int], int], held: Callable[[int, int], int]
) -> tuple[int, int]:
  """The tiles of two dimensions that fit in VMEM and move the fewest elements. If several do, the largest."""
  fitting = [pair for pair in itertools.product(one, other) if held(*pair) <= VMEM_BYTES]
  return min(fitting, key=lambda pair: (moved(*pair), -pair[0] * pair[1]))


def _splits(size: int, whole: bool = False) -> list[int]:
  """Tile sizes: the whole dimension, 128, and the multiples of 128 that waste at most 3 %, or nothing if `whole`."""
  most = size if whole else size / 0.97
  return [size, *(tile for tile in range(128, size, 128) if tile == 128 or _count(size, tile) * tile <= most)]


def _whole_tiles(x_RI: jax.Array, tiles: Tiles) -> jax.Array:
  """Pads the rows with zeros to a whole number of tiles."""
  return jnp.pad(x_RI, ((0, -len(x_RI) % tiles[0]), (0, 0)))


def _count(size: int, tile: int) -> int:
  return -(-size // tile)
