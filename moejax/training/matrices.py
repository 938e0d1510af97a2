"""The matrices of layers that adapters train, and their arrays as stacks of matrices.

I contracted dimension  J other dimension
Leading dimensions of stacked layers and experts are not named.
"""

import functools
import math
from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers as Axes


def matrices(axes: Any) -> dict[str, Axes]:
  """The axes of each matrix by its path, of a tree with the axes of each parameter, or None if it is no matrix."""
  leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda leaf: leaf is None or isinstance(leaf, Axes))
  return {jax.tree_util.keystr(path): found for path, found in leaves if found is not None}


def by_path(tree: Any) -> dict[str, jax.Array]:
  """The arrays of a tree by their paths."""
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def as_matrix(weight: jax.Array, axes: Axes) -> jax.Array:
  """A parameter as a stack of matrices [..., I, J]."""
  order, inputs, outputs = _order(weight.ndim, axes), len(axes.reduction_axis), len(axes.output_axis)
  shape = [weight.shape[axis] for axis in order]
  stacked = shape[: len(shape) - inputs - outputs]
  rows, columns = math.prod(shape[len(stacked) : len(stacked) + inputs]), math.prod(shape[len(stacked) + inputs :])
  return weight.transpose(order).reshape(*stacked, rows, columns)


def from_matrix(w_IJ: jax.Array, shape: tuple[int, ...], axes: Axes) -> jax.Array:
  """A parameter of this shape, from its matrices."""
  order = _order(len(shape), axes)
  back = sorted(range(len(order)), key=functools.partial(list.__getitem__, order))
  return w_IJ.reshape([shape[axis] for axis in order]).transpose(back)


def _order(rank: int, axes: Axes) -> list[int]:
  """The dimensions of a weight: stacked ones, then its inputs, then its outputs."""
  own = (*axes.reduction_axis, *axes.output_axis)
  return [*(axis for axis in range(rank) if axis not in own), *own]
