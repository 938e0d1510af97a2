"""The model for inference, whose sparse layers do not drop tokens."""

import dataclasses

from moejax.config.model import Model
from moejax.config.sharding import check_dimensions, of_whole_sequences
from moejax.config.tensors import check_activations
from moejax.errors import UserError
from moejax.inference.sparse import Sparse, sparse_model
from moejax.models.abstract import AbstractModel, abstract_model
from moejax.partitioning import Partitioner


def inference_model(config: Model, partitioner: Partitioner, sparse: Sparse | None = None) -> AbstractModel:
  """The abstract model from which inference compiles. Its parameters have the names and shapes of training.

  Args:
    config: what was trained.
    partitioner: places it.
    sparse: which experts a model uses that was trained with all of them. None uses all.

  Raises:
    UserError: the rules cannot place a parameter, or as `dropless` and `sparse_model`.
  """
  model = dropless(dataclasses.replace(config.with_remat("none"), depths=config.depths.causal()))
  partitioner = dataclasses.replace(partitioner, rules=of_whole_sequences(partitioner.rules))
  return abstract_model(model if sparse is None else sparse_model(model, sparse), partitioner)


def check_batch_size(model: AbstractModel, batch_size: int) -> None:
  """Checks that the rules can shard the activations of `batch_size` sequences of any length.

  Raises:
    UserError: If they cannot.
  """
  rules, mesh = model.partitioner.rules, model.partitioner.shape
  check_dimensions("evaluation.batch_size", {"batch": batch_size}, rules, mesh)
  check_activations("evaluation.batch_size", model.config, batch_size, 1, rules, mesh)


def dropless(model: Model) -> Model:
  """The model with dropless sparse layers, in which the output of a token does not depend on other sequences.

  Raises:
    UserError: If the router is not causal, so that the model cannot predict one token at a time.
  """
  moe = model.moe
  if moe is None:
    return model
  if moe.router.looks_ahead:
    raise UserError(
      f"router.kind={moe.router.kind!r} is not causal, so the model cannot generate or score text; train with another "
      "router"
    )
  # Groups of one token divide any batch. Without dropped tokens, the capacity has no effect.
  capacity_factor = moe.capacity_factor if moe.router.has_capacity else 1.0
  moe = dataclasses.replace(moe, dispatch=moe.dispatch.without_drops(), group_size=1, capacity_factor=capacity_factor)
  return dataclasses.replace(model, moe=moe)
