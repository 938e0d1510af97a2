"""The matrix of each expert as an array of its own, for decoding on one CPU device.

A product with a slice of a stack copies the slice first, which takes as long as the product. The arrays share the
memory of the stacks, so that prefill can use the stacks.
"""

from typing import Any

import jax
import numpy as np

from moejax.config.dispatch import GroupedDispatch
from moejax.models.abstract import AbstractModel, Parameters
from moejax.models.moe.experts import NAMES

LARGE = 2**16
"""Number of bytes of a matrix from which an array of its own saves more time than passing it to the program takes."""


def separate_experts(model: AbstractModel, parameters: Parameters) -> Parameters:
  """Parameters in which stacks of large expert matrices are tuples of arrays, which share their memory.

  Only for the dispatch `grouped` on one CPU device. Stacks of layers (`layers: scanned`) stay as they are.
  """
  moe, placement = model.config.moe, model.partitioner
  on_one = placement.platform == "cpu" and placement.mesh.size == 1
  if moe is None or not on_one or not isinstance(moe.dispatch, GroupedDispatch):
    return parameters

  def separate(parameter: jax.Array, names: tuple[str | None, ...]) -> Any:
    if names not in NAMES.values() or parameter[0].nbytes < LARGE:
      return parameter
    return tuple(jax.device_put(list(np.asarray(parameter)), placement.replicated, may_alias=True))

  return jax.tree.map(separate, parameters, model.names)
