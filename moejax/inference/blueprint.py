"""A model as it predicts, without its numbers: what every function of inference is compiled from."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from moejax.config.model import Model
from moejax.config.sharding import check_dimensions
from moejax.config.tensors import check_activations
from moejax.errors import UserError
from moejax.models.transformer import Transformer
from moejax.partitioning import Partitioner
from moejax.training.state import Parameters, abstract_variables


@dataclasses.dataclass(frozen=True)
class Blueprint:
  """A model on a mesh. Its parameters are those of training, name for name and shape for shape."""

  model: Model
  partitioner: Partitioner
  graph: nnx.GraphDef
  abstract: Any
  """Parameters as shapes, types and placements."""

  @property
  def shardings(self) -> Any:
    """Placement of each parameter."""
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

  def module(self, parameters: Parameters) -> Transformer:
    """The module with these parameters."""
    return nnx.merge(self.graph, parameters)

  def check_batch(self, batch_size: int) -> None:
    """Checks that the rules place every activation of so many sequences, of whatever length.

    Raises:
      UserError: they do not.
    """
    partitioner = self.partitioner
    check_dimensions("evaluation.batch_size", {"batch": batch_size}, partitioner.rules, partitioner.shape)
    check_activations("evaluation.batch_size", self.model, batch_size, 1, partitioner.rules, partitioner.shape)


def make_blueprint(model: Model, partitioner: Partitioner) -> Blueprint:
  """The blueprint of a trained model; allocates nothing.

  Raises:
    UserError: a parameter that the rules cannot place, or as `dropless`.
  """
  model = dropless(dataclasses.replace(model, remat="none"))
  graph, variables = abstract_variables(model, partitioner)
  return Blueprint(model, partitioner, graph, nnx.to_pure_dict(variables))


def dropless(model: Model) -> Model:
  """The model with sparse layers that drop no choice: what a token gets depends on no other token of the batch.

  Raises:
    UserError: experts choose their tokens, later ones too, so that no token can be predicted before it is there.
  """
  moe = model.moe
  if moe is None:
    return model
  if moe.router.looks_ahead:
    raise UserError(
      f"router.kind={moe.router.kind!r} lets a prediction depend on later tokens, so the model cannot continue or "
      "score a text; train with another router for that"
    )
  if moe.dispatch == "dense":
    return model
  # Groups of one token divide any batch; what limits rows goes back to its default, which grouped does not read.
  moe = dataclasses.replace(
    moe, dispatch="grouped", group_size=1, capacity_factor=1.0, priority="choice", receive_factor=None
  )
  return dataclasses.replace(model, moe=moe)


def put(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """Rows on the devices; every process holds all of them and gives what its devices need."""
  return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
