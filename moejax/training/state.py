"""The state of training, its sharding and its initialization."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from moejax.config.experiment import Experiment
from moejax.host_memory import HOST
from moejax.models.abstract import AbstractModel, Parameters, abstract_model
from moejax.partitioning import Partitioner
from moejax.training.anomalies import watched
from moejax.training.optimizers import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """The whole state of training."""

  step: jax.Array
  """Number of completed optimizer steps, int32."""
  parameters: Parameters
  """float32."""
  optimizer: optax.OptState
  """Moments, sharded like the parameters, in float32 or as optimizer.moment_dtype. Their arrays are in the memory of
  the host with optimizer.offload_moments."""


@dataclasses.dataclass(frozen=True)
class TrainSpec:
  """The abstract model, optimizer and abstract state of an experiment, from which the training step is compiled."""

  experiment: Experiment
  model: AbstractModel
  optimizer: optax.GradientTransformationExtraArgs
  abstract_state: Any
  """A State that holds a `jax.ShapeDtypeStruct` with its sharding for each array."""
  initialize: Callable[[jax.Array], State]
  """Initializes the state directly on the devices from a PRNG key. Compiled at the first call."""

  @property
  def partitioner(self) -> Partitioner:
    return self.model.partitioner

  @property
  def shardings(self) -> State:
    """The sharding of each array of the state."""
    return _shardings(self.abstract_state)

  def init_state(self, seed: int) -> State:
    """Initializes the state directly on the devices. Its values depend only on the seed, not on the mesh."""
    return self.initialize(jax.random.key(seed))


def make_train_spec(experiment: Experiment, partitioner: Partitioner) -> TrainSpec:
  """Makes the spec of an experiment on a mesh, without allocating memory.

  Raises:
    UserError: If the rules cannot shard a parameter.
  """
  model = abstract_model(experiment.model, partitioner)
  optimizer = watched(make_optimizer(experiment.optimizer, model.variables), experiment.training.anomalies)
  step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=partitioner.replicated)
  moments = _abstract_moments(optimizer, model.parameters, partitioner.replicated)
  if experiment.optimizer.offload_moments:
    moments = jax.tree.map(_on_host, moments)
  abstract_state = State(step, model.parameters, moments)

  def initialize(key: jax.Array) -> State:
    parameters = model.init(key)
    return State(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters))

  compiled = jax.jit(initialize, out_shardings=_shardings(abstract_state))
  return TrainSpec(experiment, model, optimizer, abstract_state, compiled)


def _on_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """A leaf in the memory of the host, unless it is a single number."""
  if not leaf.shape:
    return leaf
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(HOST))


def _shardings(abstract_state: State) -> State:
  return jax.tree.map(lambda leaf: leaf.sharding, abstract_state)


def _abstract_moments(
  optimizer: optax.GradientTransformation, parameters: Parameters, replicated: NamedSharding
) -> optax.OptState:
  """The optimizer state as shapes. A leaf that mirrors a parameter has its sharding, and other leaves are replicated.

  A leaf mirrors a parameter if its path ends in the path of the parameter and their shapes are equal.
  """
  placed = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}

  def with_sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    suffixes = (path[start:] for start in range(len(path)))
    mirrored = next((placed[suffix] for suffix in suffixes if suffix in placed), None)
    sharding = mirrored.sharding if mirrored is not None and mirrored.shape == leaf.shape else replicated
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(with_sharding, jax.eval_shape(optimizer.init, parameters))
