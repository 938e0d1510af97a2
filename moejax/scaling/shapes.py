"""What scaling laws read of a model: its parameters, and how its feed-forward layers are divided into experts."""

import dataclasses

from moejax.config.experiment import Experiment
from moejax.config.model import Model
from moejax.config.parameters import flops_per_token, parameter_counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """The size of a dense or MoE model. A dense model has expansion 1 and granularity 1."""

  active: float
  """Parameters that one token uses, with embeddings."""
  total: float
  """All parameters, with embeddings."""
  embedding: float = 0.0
  """Parameters of embeddings."""
  expansion: float = 1.0
  """Feed-forward parameters divided by those that one token uses, over all layers: the number of experts where each
  token has one expert as wide as a dense layer."""
  granularity: float = 1.0
  """Number of experts that one token uses in a sparse layer, shared ones included: the active width divided by the
  width of an expert."""
  flops_per_token: float | None = None
  """FLOPs to train on one token. None: 6 per active parameter."""

  @property
  def is_dense(self) -> bool:
    return self.expansion <= 1.0

  @property
  def training_flops(self) -> float:
    """FLOPs to train on one token."""
    return 6 * self.active if self.flops_per_token is None else self.flops_per_token

  @property
  def active_non_embedding(self) -> float:
    return self.active - self.embedding

  @property
  def total_non_embedding(self) -> float:
    return self.total - self.embedding


def shape_of(experiment: Experiment) -> Shape:
  """The shape of the model of an experiment, without modules for multi-token prediction except in FLOPs."""
  model = experiment.model.main
  counted = parameter_counts(model)
  return Shape(
    active=counted.active,
    total=counted.total,
    embedding=counted.embedding,
    expansion=_expansion(model, counted.total - counted.active),
    granularity=model.moe.experts_per_token + model.moe.num_shared_experts if model.moe else 1.0,
    flops_per_token=flops_per_token(experiment.model, experiment.data.sequence_length),
  )


def _expansion(model: Model, inactive: float) -> float:
  if model.moe is None:
    return 1.0
  experts = model.moe.experts_per_token + model.moe.num_shared_experts
  sparse = model.num_sparse_layers * experts * model.feed_forward_matrices * model.d_model * model.moe.d_ff
  dense = model.feed_forward.parameters(model.d_model, model.d_ff, model.is_gated)
  return 1 + inactive / (sparse + (model.num_layers - model.num_sparse_layers) * dense)
