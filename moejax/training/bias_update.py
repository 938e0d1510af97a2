"""Auxiliary-loss-free load balancing: updates the bias of each expert after each step (arXiv 2408.15664).

E experts  L stacked layers
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moejax.models.moe.layer import BIAS


def update_bias(parameters: Mapping[str, Any], choices_LE: jax.Array, rate: float) -> dict[str, Any]:
  """Returns the parameters with every router bias updated: plus `rate` for experts below the mean load, minus `rate`
  for those above (arXiv 2408.15664, algorithm 1).

  Args:
    parameters: of the whole model.
    choices_LE: how often each expert was chosen in the step, as integers, in the order of the sparse layers.
    rate: the bias update rate.
  """
  E = choices_LE.shape[-1]
  # Integers, since the float32 mean of equal loads may differ from these loads.
  total_L1 = jnp.sum(choices_LE, axis=-1, keepdims=True)
  whole_L1, rest_L1 = total_L1 // E, total_L1 % E
  above_LE = choices_LE > whole_L1
  below_LE = (choices_LE < whole_L1) | (~above_LE & (rest_L1 > 0))
  direction_LE = below_LE.astype(jnp.float32) - above_LE.astype(jnp.float32)
  biases = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(parameters) if path[-1].key == BIAS]
  of_period = sum(leaf.ndim > 1 for leaf in biases)  # stacks, of which each has every `of_period`-th of their layers
  stacked = sum(len(leaf) for leaf in biases if leaf.ndim > 1)
  stack, layer = 0, stacked

  def moved(path: tuple, leaf: jax.Array) -> jax.Array:
    nonlocal stack, layer
    if path[-1].key != BIAS:
      return leaf
    if leaf.ndim > 1:
      here = direction_LE[stack:stacked:of_period]
      stack += 1
    else:  # one layer after the other, after those in stacks
      here = direction_LE[layer]
      layer += 1
    return leaf + rate * here

  return jax.tree_util.tree_map_with_path(moved, parameters)
