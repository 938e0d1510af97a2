"""Grouped matrix products on TPU: megablox, which JAX ships, with tiles that fit the shapes.

R routed rows  E experts  D embed  F hidden  I contracted dimension  J other dimension

D and F may be either way round.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm as megablox_gmm
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm as megablox_tgmm

VMEM_BYTES = 12 * 2**20
"""What the tiles of a kernel may take of the 16 MiB that XLA lets it have unless told otherwise."""

Tiles = tuple[int, int, int]
"""Rows, then the two dimensions of a weight: summed and other in `gmm`, D and F in `tgmm`."""


def gmm(
  x_RI: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, *, transpose_w: bool, interpret: bool = False
) -> jax.Array:
  """out_RJ: each group's rows times its expert's matrix, or times the transpose of it."""
  (R, I), E, J = x_RI.shape, len(w_EDF), w_EDF.shape[1 if transpose_w else 2]
  tiles = gmm_tiles(R, E, I, J, max(x_RI.dtype.itemsize, w_EDF.dtype.itemsize))
  x_RI = _whole_tiles(x_RI, tiles)
  out_RJ = megablox_gmm(x_RI, w_EDF, group_sizes_E, x_RI.dtype, tiles, transpose_rhs=transpose_w, interpret=interpret)
  # Tiles in which no group has a row are not visited: they hold whatever was in memory.
  return jnp.where(jnp.arange(R)[:, None] < jnp.sum(group_sizes_E), out_RJ[:R], 0)


def tgmm(
  x_RD: jax.Array, y_RF: jax.Array, group_sizes_E: jax.Array, *, dtype: jnp.dtype, interpret: bool = False
) -> jax.Array:
  """out_EDF: each group's rows of x, transposed, times its rows of y; zeros for an empty group."""
  (R, D), E, F = x_RD.shape, len(group_sizes_E), y_RF.shape[1]
  tiles = tgmm_tiles(R, E, D, F, max(x_RD.dtype.itemsize, y_RF.dtype.itemsize, dtype.itemsize))
  x_DR, y_RF = _whole_tiles(x_RD, tiles).swapaxes(0, 1), _whole_tiles(y_RF, tiles)
  return megablox_tgmm(x_DR, y_RF, group_sizes_E, dtype, tiles, interpret=interpret)


def gmm_tiles(R: int, E: int, I: int, J: int, itemsize: int) -> Tiles:
  """Tiles that move the fewest elements between HBM and VMEM."""
  tile_R = row_tile(R, E)

  def moved(tile_I: int, tile_J: int) -> int:
    # A weight tile stays in VMEM while the row tiles of its group pass, unless I is split.
    times = E if tile_I >= I else visits(R, E, tile_R)
    return R * I * _count(J, tile_J) + times * I * J

  def held(tile_I: int, tile_J: int) -> int:
    return 2 * itemsize * (tile_R * tile_I + tile_I * tile_J + tile_R * tile_J) + 4 * tile_R * tile_J

  return tile_R, *_best(I, J, moved, held)


def tgmm_tiles(R: int, E: int, D: int, F: int, itemsize: int) -> Tiles:
  """Tiles that move the fewest elements between HBM and VMEM."""
  tile_R = row_tile(R, E)

  def moved(tile_D: int, tile_F: int) -> int:
    return R * D * _count(F, tile_F) + R * F * _count(D, tile_D)

  def held(tile_D: int, tile_F: int) -> int:
    # Rows are masked in float32 before the product.
    masked = 4 * tile_R * (tile_D + tile_F)
    return 2 * itemsize * (tile_R * tile_D + tile_R * tile_F + tile_D * tile_F) + 4 * tile_D * tile_F + masked

  return tile_R, *_best(D, F, moved, held)


def row_tile(R: int, E: int) -> int:
  """Rows of a tile: as many as keep what is computed twice, at borders of groups, below a tenth; 128 at least.

  The matrix unit takes 128 cycles or more to load its weights whatever the rows are, so that lower tiles lose time
  though they save FLOPs. Groups of fewer than 1280 rows in the mean therefore compute more than 1.1 times the ideal.
  """
  return next((rows for rows in (512, 256) if (E - 1) * rows <= 0.1 * R), 128)


def visits(R: int, E: int, tile_R: int) -> int:
  """Row tiles that a product works through at most: all of them, and again those in which another group starts."""
  return _count(R, tile_R) + E - 1


def _best(one: int, other: int, moved: Callable[[int, int], int], held: Callable[[int, int], int]) -> tuple[int, int]:
  """Tiles of two dimensions that fit VMEM and move the fewest elements; of equals the largest."""
  fitting = [pair for pair in itertools.product(_splits(one), _splits(other)) if held(*pair) <= VMEM_BYTES]
  return min(fitting, key=lambda pair: (moved(*pair), -pair[0] * pair[1]))


def _splits(size: int) -> list[int]:
  """The whole dimension, 128, and the multiples of 128 that fill it to 97 % or more: the rest would be computed too."""
  return [size, *(tile for tile in range(128, size, 128) if tile == 128 or _count(size, tile) * tile * 0.97 <= size)]


def _whole_tiles(x_RI: jax.Array, tiles: Tiles) -> jax.Array:
  """Zero rows below, to a whole number of tiles."""
  return jnp.pad(x_RI, ((0, -len(x_RI) % tiles[0]), (0, 0)))


def _count(size: int, tile: int) -> int:
  return -(-size // tile)
