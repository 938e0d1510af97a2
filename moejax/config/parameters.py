"""Parameters, FLOPs and token budgets, by formula: what `moejax show` prints without importing JAX.

A test holds the counts equal to the arrays that the model really makes.
"""

import dataclasses
import math

from moejax.config.experiment import Experiment
from moejax.config.model import Model
from moejax.config.training import Budget


@dataclasses.dataclass(frozen=True)
class Parameters:
  """Parameter counts of one model."""

  total: int
  """All of them."""
  active: int
  """Those that one token uses: all but the experts that it is not sent to."""
  embedding: int
  """Embedding, and output projection where it is not tied."""

  @property
  def non_embedding(self) -> int:
    return self.total - self.embedding

  @property
  def active_non_embedding(self) -> int:
    return self.active - self.embedding

  def counted(self, kind: str) -> int:
    """The count that `Budget.parameters` names."""
    return getattr(self, kind)


def count(model: Model) -> Parameters:
  """Parameters of `model`."""
  attention = model.d_model * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
  attention += 2 * model.head_dim if model.qk_norm else 0
  norms = 2 * model.d_model
  dense_layers = model.num_layers - model.num_sparse_layers
  shared = model.num_layers * (attention + norms) + dense_layers * 3 * model.d_model * model.d_ff + model.d_model
  embedding = model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
  if model.moe is None:
    return Parameters(total=shared + embedding, active=shared + embedding, embedding=embedding)
  expert = 3 * model.d_model * model.moe.d_ff
  router = model.d_model * model.moe.num_experts

  def with_experts(experts: int) -> int:
    return shared + embedding + model.num_sparse_layers * (router + experts * expert)

  return Parameters(
    total=with_experts(model.moe.num_experts),
    active=with_experts(model.moe.experts_per_token),
    embedding=embedding,
  )


def flops_per_token(model: Model, sequence_length: int) -> int:
  """FLOPs to train on one token: 6 per active matrix parameter and 12 x L x N x H x T for attention scores and values.

  PaLM's convention (arXiv 2204.02311, appendix B): the causal half is not taken off, and neither recomputation nor the
  dispatch of sparse layers counts.
  """
  parameters = count(model)
  norms = model.d_model * (2 * model.num_layers + 1)
  norms += 2 * model.head_dim * model.num_layers if model.qk_norm else 0
  matrices = parameters.active_non_embedding - norms + model.vocab_size * model.d_model
  attention = 12 * model.num_layers * model.num_heads * model.head_dim * sequence_length
  return 6 * matrices + attention


def tokens_per_step(experiment: Experiment) -> int:
  """Tokens in one optimizer step."""
  return experiment.training.batch_size * experiment.data.sequence_length


def budget_tokens(model: Model, budget: Budget) -> int:
  """Tokens that the compute-optimal rule gives `model`."""
  return math.ceil(budget.tokens_per_parameter * count(model).counted(budget.parameters))


def steps(experiment: Experiment) -> int:
  """Optimizer steps of the run: as set, or as many as the budget needs."""
  training = experiment.training
  return training.steps or math.ceil(budget_tokens(experiment.model, training.budget) / tokens_per_step(experiment))
