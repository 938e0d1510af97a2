"""Parameters of layers one by one, in place of stacks over which a program loops.

A loop copies the parameters of its layer out of the stack, all experts among them. In decoding, which reads each
parameter once, that takes longer than the step itself (`tests/benchmarks/ds_moe_decode.py`).
"""

import dataclasses
from typing import Any

import jax

from moejax.models.abstract import AbstractModel, Parameters, abstract_model


def unroll(model: AbstractModel, parameters: Parameters) -> tuple[AbstractModel, Parameters]:
  """The same model without a loop over layers, and its parameters. The stacks are deleted one by one, so that at most
  one of them is held twice."""
  if model.config.layers == "unrolled":
    return model, parameters
  unrolled = abstract_model(dataclasses.replace(model.config, layers="unrolled"), model.partitioner)
  layers: dict[int, Any] = unrolled.parameters["layers"]
  structure: Any = jax.tree.structure(layers[0])
  stacks = zip(structure.flatten_up_to(parameters["layers"]), jax.tree.leaves(layers[0]), strict=True)
  of_periods = [_split(stack, len(layers), placed.sharding) for stack, placed in stacks]
  apart = {period: structure.unflatten(leaves[period] for leaves in of_periods) for period in layers}
  return unrolled, {**parameters, "layers": apart}


def _split(stack: jax.Array, periods: int, sharding: jax.sharding.Sharding) -> list[jax.Array]:
  apart = jax.jit(lambda x: [x[i] for i in range(periods)], out_shardings=[sharding] * periods)(stack)
  jax.block_until_ready(apart)
  stack.delete()
  return apart
