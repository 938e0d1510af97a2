"""Abstract models: transformers without values, from which programs are compiled and parameters initialized."""

import dataclasses
import math
from typing import Any

import jax
from flax import nnx

from moejax.config.model import Model
from moejax.models.transformer import Transformer
from moejax.partitioning import Partitioner

Parameters = dict[str, Any]
"""Nested dictionary of arrays, keyed by module and weight."""


@dataclasses.dataclass(frozen=True)
class AbstractModel:
  """The structure of a transformer on a mesh, and the shape, dtype and sharding of each parameter."""

  config: Model
  partitioner: Partitioner
  graph: nnx.GraphDef
  variables: nnx.State
  """`nnx.Param`s that contain a `jax.ShapeDtypeStruct` with its sharding, and have the logical axes as `names`."""

  @property
  def parameters(self) -> Parameters:
    """A `jax.ShapeDtypeStruct` with its sharding for each parameter."""
    return nnx.to_pure_dict(self.variables)

  @property
  def names(self) -> Parameters:
    """The logical axes of each parameter."""
    return nnx.to_pure_dict(jax.tree.map(lambda variable: variable.names, self.variables, is_leaf=_is_variable))

  @property
  def shardings(self) -> Parameters:
    """The sharding of each parameter."""
    return jax.tree.map(lambda leaf: leaf.sharding, self.parameters)

  def module(self, parameters: Parameters) -> Transformer:
    """The transformer with these parameters."""
    return nnx.merge(self.graph, parameters)

  def init(self, key: jax.Array) -> Parameters:
    """Random parameters in float32, which depend only on the key, not on the mesh. Must be called under `jax.jit`."""
    return nnx.to_pure_dict(nnx.split(Transformer(self.config, self.partitioner, nnx.Rngs(params=key)))[1])


def abstract_model(config: Model, partitioner: Partitioner) -> AbstractModel:
  """Makes the abstract model of a configuration, without allocating memory.

  Raises:
    UserError: If the rules cannot shard a parameter.
  """
  graph, variables = nnx.split(nnx.eval_shape(lambda: Transformer(config, partitioner, nnx.Rngs(params=0))))

  def with_sharding(path: tuple, variable: nnx.Variable) -> nnx.Variable:
    value = variable.get_value()
    sharding = partitioner.sharding(variable.names, value.shape, "parameter " + parameter_name(path))
    return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

  variables = jax.tree_util.tree_map_with_path(with_sharding, variables, is_leaf=_is_variable)
  return AbstractModel(config, partitioner, graph, variables)


def parameter_name(path: tuple) -> str:
  """`layers.blocks.0.attention.w_q_DNH` from a tree path."""
  return ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path if not hasattr(key, "name"))


def placement_table(model: AbstractModel) -> list[tuple[str, str, str, int]]:
  """Name, shape, PartitionSpec and bytes per device of each parameter."""
  return [
    (
      parameter_name(path),
      " x ".join(map(str, leaf.shape)),
      str(leaf.sharding.spec),
      leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)),
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.parameters)
  ]


def _is_variable(leaf: Any) -> bool:
  return isinstance(leaf, nnx.Variable)
