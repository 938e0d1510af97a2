"""What a run carries from step to step, where its arrays lie, and how it begins."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding

from moejax.config.experiment import Experiment
from moejax.config.model import Model
from moejax.models.transformer import Transformer
from moejax.partitioning import Partitioner
from moejax.training.optimizers import make_optimizer

Parameters = dict[str, Any]
"""Nested dictionary of arrays, keyed by module and weight."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """The whole state of training."""

  step: jax.Array
  """Optimizer steps done, int32."""
  parameters: Parameters
  """float32."""
  optimizer: optax.OptState
  """Adam's moments, float32, placed as the parameters."""


@dataclasses.dataclass(frozen=True)
class Definition:
  """A model without its numbers: enough to plan, to initialise and to compile, whatever its size."""

  experiment: Experiment
  partitioner: Partitioner
  graph: nnx.GraphDef
  optimizer: optax.GradientTransformation
  abstract: Any
  """A State of shapes, types and placements."""
  names: Parameters
  """Logical axis names of each parameter."""

  @property
  def shardings(self) -> State:
    """Placement of each array of the state."""
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

  def model(self, parameters: Parameters) -> Transformer:
    """The module with these parameters."""
    return nnx.merge(self.graph, parameters)

  def initialise(self, seed: int) -> State:
    """A fresh state, each array made where it belongs; the numbers depend on the seed alone, not on the mesh."""

    def make(key: jax.Array) -> State:
      model = Transformer(self.experiment.model, self.partitioner, nnx.Rngs(params=key))
      parameters = nnx.to_pure_dict(nnx.split(model)[1])
      return State(jnp.zeros((), jnp.int32), parameters, self.optimizer.init(parameters))

    return jax.jit(make, out_shardings=self.shardings)(jax.random.key(seed))


def define(experiment: Experiment, partitioner: Partitioner) -> Definition:
  """The definition of an experiment's model and state on a mesh; allocates nothing.

  Raises:
    UserError: a parameter that the rules cannot place.
  """
  graph, variables = abstract_variables(experiment.model, partitioner)
  names = nnx.to_pure_dict(jax.tree.map(lambda variable: variable.names, variables, is_leaf=_is_variable))
  parameters = nnx.to_pure_dict(variables)
  optimizer = make_optimizer(experiment.optimizer, variables)
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=partitioner.replicated)
  moments: Any = _place_moments(optimizer, parameters, partitioner.replicated)
  abstract = State(step, parameters, moments)  # type: ignore[arg-type]  # shapes in place of arrays
  return Definition(experiment, partitioner, graph, optimizer, abstract, names)


def abstract_variables(model: Model, partitioner: Partitioner) -> tuple[nnx.GraphDef, nnx.State]:
  """The structure of a transformer, and its parameters as shapes, types and placements, with their names.

  Raises:
    UserError: a parameter that the rules cannot place.
  """
  graph, variables = nnx.split(nnx.eval_shape(lambda: Transformer(model, partitioner, nnx.Rngs(params=0))))

  def place(path: tuple, variable: nnx.Variable) -> nnx.Variable:
    value = variable.get_value()
    sharding = partitioner.sharding(variable.names, value.shape, "parameter " + parameter_name(path))
    return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

  return graph, jax.tree_util.tree_map_with_path(place, variables, is_leaf=_is_variable)


def parameter_name(path: tuple) -> str:
  """`layers.blocks.0.attention.w_q_DNH` from a tree path."""
  return ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path if not hasattr(key, "name"))


def placement_table(definition: Definition) -> list[tuple[str, str, str, int]]:
  """Name, shape, PartitionSpec and bytes per device of each parameter."""
  rows = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(definition.abstract.parameters)[0]:
    local = leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize
    for length in local:
      size *= length
    rows.append((parameter_name(path), " x ".join(map(str, leaf.shape)), str(leaf.sharding.spec), size))
  return rows


def _is_variable(leaf: Any) -> bool:
  return isinstance(leaf, nnx.Variable)


def _place_moments(
  optimizer: optax.GradientTransformation, parameters: Parameters, replicated: NamedSharding
) -> optax.OptState:
  """The optimizer's state as shapes: what mirrors a parameter lies where it does, all else on every device.

  A leaf mirrors the parameter whose path its own path ends in, where the shapes agree.
  """
  placed = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}

  def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    suffixes = (path[start:] for start in range(len(path)))
    mirrored = next((placed[suffix] for suffix in suffixes if suffix in placed), None)
    sharding = mirrored.sharding if mirrored is not None and mirrored.shape == leaf.shape else replicated
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, parameters))
