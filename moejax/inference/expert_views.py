"""The matrices of experts in the form that is fastest for generation on one device.

On CPU, the matrix of each expert is an array of its own for decoding: a product with a slice of a stack copies the
slice first, which takes as long as the product. The arrays share the memory of the stacks, so that prefill can use the
stacks.

For 8-bit products, the matrices are rounded once, since a product would round those of all experts for every token.
"""

from typing import Any

import jax
import numpy as np

from moejax.config.dispatch import GroupedDispatch
from moejax.kernels.grouped_eight_bits import rounded_matrices
from moejax.models.abstract import AbstractModel, Parameters
from moejax.models.moe.experts import NAMES

LARGE = 2**16
"""Number of bytes of a matrix from which an array of its own saves more time than passing it to the program takes."""

MOST = 4096
"""Maximum number of such arrays. The time for compilation grows with it: 8 s of CPU time for 1800 arrays."""


def round_experts(model: AbstractModel, parameters: Parameters) -> Parameters:
  """Parameters in which the stacks of expert matrices are rounded to the 8-bit type of `model.precision.experts`.

  Only for the dispatch `grouped` on one device. Stacks of layers (`layers: scanned`) stay as they are.
  """
  moe, placement, bits = model.config.moe, model.partitioner, model.config.precision.experts
  if moe is None or bits == "compute" or placement.mesh.size > 1 or not isinstance(moe.dispatch, GroupedDispatch):
    return parameters
  dtype = placement.compute_dtype(model.config)
  rounded = jax.jit(lambda stack: rounded_matrices(stack.astype(dtype), bits))
  return jax.tree.map(
    lambda parameter, names: rounded(parameter) if names in NAMES.values() else parameter, parameters, model.names
  )


def separate_experts(model: AbstractModel, parameters: Parameters) -> Parameters:
  """Parameters in which stacks of large expert matrices are tuples of arrays, which share their memory.

  Only for the dispatch `grouped` on one CPU device, without 8-bit products, and up to MOST arrays. Stacks of layers
  (`layers: scanned`) stay as they are.
  """
  moe, placement = model.config.moe, model.partitioner
  on_one = placement.platform == "cpu" and placement.mesh.size == 1
  plain = model.config.precision.experts == "compute"
  if moe is None or not on_one or not plain or not isinstance(moe.dispatch, GroupedDispatch):
    return parameters

  def is_stack(parameter: jax.Array, names: tuple[str | None, ...]) -> bool:
    return names in NAMES.values() and parameter.nbytes >= LARGE * len(parameter)

  def separate(parameter: jax.Array, stacked: bool) -> Any:
    if not stacked:
      return parameter
    return tuple(jax.device_put(list(np.asarray(parameter)), placement.replicated, may_alias=True))

  stacked = jax.tree.map(is_stack, parameters, model.names)
  if sum(jax.tree.leaves(stacked)) * moe.num_experts > MOST:
    return parameters
  return jax.tree.map(separate, parameters, stacked)
