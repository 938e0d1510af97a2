"""Grouped matrix products on TPU: megablox, which JAX ships, with tiles that fit the shapes.

R routed rows, sorted by expert  E experts  D, F dimensions of a weight  K summed dimension  N other dimension
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
  x_RK: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, *, transpose_w: bool, interpret: bool = False
) -> jax.Array:
  """out_RN: each group's rows times its expert's matrix, or times the transpose of it."""
  (R, K), E, N = x_RK.shape, len(w_EDF), w_EDF.shape[1 if transpose_w else 2]
  tiles = gmm_tiles(R, E, K, N, max(x_RK.dtype.itemsize, w_EDF.dtype.itemsize))
  x_RK = _whole_tiles(x_RK, tiles)
  out_RN = megablox_gmm(x_RK, w_EDF, group_sizes_E, x_RK.dtype, tiles, transpose_rhs=transpose_w, interpret=interpret)
  # Tiles in which no group has a row are not visited: they hold whatever was in memory.
  return jnp.where(jnp.arange(R)[:, None] < jnp.sum(group_sizes_E), out_RN[:R], 0)


def tgmm(
  x_RD: jax.Array, y_RF: jax.Array, group_sizes_E: jax.Array, *, dtype: jnp.dtype, interpret: bool = False
) -> jax.Array:
  """out_EDF: each group's rows of x, transposed, times its rows of y; zeros for an empty group."""
  (R, D), E, F = x_RD.shape, len(group_sizes_E), y_RF.shape[1]
  tiles = tgmm_tiles(R, E, D, F, max(x_RD.dtype.itemsize, y_RF.dtype.itemsize, dtype.itemsize))
  x_DR, y_RF = _whole_tiles(x_RD, tiles).swapaxes(0, 1), _whole_tiles(y_RF, tiles)
  return megablox_tgmm(x_DR, y_RF, group_sizes_E, dtype, tiles, interpret=interpret)


def gmm_tiles(R: int, E: int, K: int, N: int, itemsize: int) -> Tiles:
  """Tiles that move the fewest elements between HBM and VMEM."""
  tile_R = row_tile(R, E)

  def moved(tile_K: int, tile_N: int) -> int:
    # A weight tile stays in VMEM while the row tiles of its group pass, unless K is split.
    times = E if tile_K >= K else visits(R, E, tile_R)
    return R * K * _count(N, tile_N) + times * K * N

  def held(tile_K: int, tile_N: int) -> int:
    return 2 * itemsize * (tile_R * tile_K + tile_K * tile_N + tile_R * tile_N) + 4 * tile_R * tile_N

  return tile_R, *_best(K, N, moved, held)


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


def _best(A: int, B: int, moved: Callable[[int, int], int], held: Callable[[int, int], int]) -> tuple[int, int]:
  """Tiles of two dimensions that fit VMEM and move the fewest elements; of equals the largest."""
  fitting = [pair for pair in itertools.product(_splits(A), _splits(B)) if held(*pair) <= VMEM_BYTES]
  return min(fitting, key=lambda pair: (moved(*pair), -pair[0] * pair[1]))


def _splits(size: int) -> list[int]:
  """The whole dimension, 128, and the multiples of 128 that fill it to 97 % or more: the rest would be computed too."""
  return [size, *(tile for tile in range(128, size, 128) if tile == 128 or _count(size, tile) * tile * 0.97 <= size)]


def _whole_tiles(x_RK: jax.Array, tiles: Tiles) -> jax.Array:
  """Zero rows below, to a whole number of tiles."""
  return jnp.pad(x_RK, ((0, -len(x_RK) % tiles[0]), (0, 0)))


def _count(size: int, tile: int) -> int:
  return -(-size // tile)
