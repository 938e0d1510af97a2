"""Formulas for parameters, FLOPs and token budgets, which `moejax show` uses without importing JAX.

A test compares the counts with the arrays of the model.
"""

import dataclasses
import math

from moejax.config.attention import Attention
from moejax.config.depths import Depths
from moejax.config.dispatch import GroupedDispatch
from moejax.config.experiment import Experiment
from moejax.config.model import Model
from moejax.config.training import Budget


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
  """Parameter counts of one model."""

  total: int
  """Total number of parameters."""
  active: int
  """Parameters that one token uses, without the experts that it is not sent to. With a mixture of depths, those that it
  uses on average if its `share` of the tokens goes through each routed layer."""
  embedding: int
  """Parameters of the embedding and, if it is not tied, of the output projection."""

  @property
  def non_embedding(self) -> int:
    return self.total - self.embedding

  @property
  def active_non_embedding(self) -> int:
    return self.active - self.embedding

  def counted(self, kind: str) -> int:
    """The count that `Budget.parameters` selects."""
    return getattr(self, kind)


def parameter_counts(model: Model) -> ParameterCounts:
  """Parameters of `model`, with those of its modules for multi-token prediction, which every token uses in training."""
  main = _of_main(model)
  if not model.multi_token_depth:
    return main
  of_layer, depth = _of_main(model.last_layer), model.multi_token_depth
  projection = 2 * model.d_model * model.d_model + 2 * _norm(model)
  return ParameterCounts(
    total=main.total + depth * (of_layer.non_embedding + projection),
    active=main.active + depth * (of_layer.active_non_embedding + projection),
    embedding=main.embedding,
  )


def _of_main(model: Model) -> ParameterCounts:
  if model.depths.is_routed:
    return _of_routed(model)
  dense_layers = model.num_layers - model.num_sparse_layers
  shared = _attention(model) + dense_layers * _dense_feed_forward(model) + _vectors(model)
  embedding = model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
  if model.moe is None:
    return ParameterCounts(total=shared + embedding, active=shared + embedding, embedding=embedding)
  moe = model.moe
  router = model.d_model * (moe.num_experts + moe.shared_gate)

  def with_experts(experts: int) -> int:
    layer = router + (experts + moe.num_shared_experts) * _expert(model, moe.d_ff)
    return shared + embedding + model.num_sparse_layers * layer + _expert_biases(model, experts)

  return ParameterCounts(
    total=with_experts(moe.num_experts), active=with_experts(moe.experts_per_token), embedding=embedding
  )


def _of_routed(model: Model) -> ParameterCounts:
  """The counts with layers that only a share of the tokens goes through."""
  of_all, routed, D = _of_main(dataclasses.replace(model, depths=Depths())), _routed(model), model.d_model
  norms = 4 if model.norm_places == "both" else 2
  skipped = len(routed) * norms * _norm(model)
  for attention, is_sparse in routed:
    skipped += attention.matrix_parameters(model) + attention.other_parameters(model)
    skipped += sum(_active_in_sparse(model)) if is_sparse else _dense_feed_forward(model)
  routers = len(routed) * (D + (D + 1 if model.depths.has_predictor else 0))
  active = of_all.active + routers - round((1 - model.depths.share) * skipped)
  return ParameterCounts(total=of_all.total + routers, active=active, embedding=of_all.embedding)


def _routed(model: Model) -> list[tuple[Attention, bool]]:
  """The attention of all layers that tokens can skip, and whether their feed-forward layers are sparse."""
  layers = zip(model.attention_layers, model.sparse_layers, model.routed_layers, strict=True)
  return [(attention, is_sparse) for attention, is_sparse, is_routed in layers if is_routed] * model.num_periods


def _active_in_sparse(model: Model) -> tuple[int, int]:
  """Parameters of one sparse layer that a token uses: those of matrices, and biases."""
  moe = model.moe
  assert moe
  matrices = model.d_model * (moe.num_experts + moe.shared_gate)
  matrices += (moe.experts_per_token + moe.num_shared_experts) * _expert(model, moe.d_ff)
  biases = _expert_biases(model, moe.experts_per_token) // model.num_sparse_layers
  return matrices, biases + moe.num_experts * (moe.bias + (moe.router.bias_rate > 0))


def _routed_flops(model: Model, sequence_length: int) -> int:
  """FLOPs per token of routers and predictors, less those of the tokens that skip layers."""
  T, C, D = sequence_length, model.depths.slots(sequence_length), model.d_model
  feed_forward = model.feed_forward.flops_per_token(D, model.d_ff, model.is_gated)
  skipped = 0.0
  for one, is_sparse in (routed := _routed(model)):
    products = 6 * one.matrix_parameters(model) + (6 * _active_in_sparse(model)[0] if is_sparse else feed_forward)
    of_all, of_some = (products + one.score_flops_per_token(model, seen) for seen in (T, C))
    skipped += of_all - C / T * of_some
  # A predictor has no gradient of its input.
  return len(routed) * D * (6 + (4 if model.depths.has_predictor else 0)) - round(skipped)


def _attention(model: Model) -> int:
  """Parameters of the matrices of all attention layers: queries, keys, values, output, and the router of experts."""
  return model.sum_of_attention(lambda attention: attention.matrix_parameters(model))


def _dense_feed_forward(model: Model) -> int:
  return model.feed_forward.parameters(model.d_model, model.d_ff, model.is_gated)


def _expert(model: Model, width: int) -> int:
  return model.feed_forward_matrices * model.d_model * width


def _expert_biases(model: Model, experts: int) -> int:
  """Number of parameters of the biases of this number of routed experts in each sparse layer."""
  if not model.moe or not model.moe.bias:
    return 0
  of_expert = (model.feed_forward_matrices - 1) * model.moe.d_ff + model.d_model
  return model.num_sparse_layers * experts * of_expert


def _norm(model: Model) -> int:
  """Number of parameters of a norm of the residual stream."""
  return model.d_model * (2 if model.norm == "layer" else 1)


def _vectors(model: Model) -> int:
  """Number of parameters that are not in matrices: scales of norms, and biases of attention and routers."""
  of_attention = model.sum_of_attention(lambda attention: attention.other_parameters(model))
  norms = (4 if model.norm_places == "both" else 2) * model.num_layers + 1
  vectors = norms * _norm(model) + of_attention
  if model.moe and model.moe.bias:
    vectors += model.num_sparse_layers * model.moe.num_experts  # of routers
  biased = model.moe is not None and model.moe.router.bias_rate > 0
  return vectors + (model.num_sparse_layers * model.moe.num_experts if model.moe and biased else 0)


def flops_per_token(model: Model, sequence_length: int) -> int:
  """FLOPs to train on one token: 6 per active matrix parameter and 12 x L x N x H x T for attention scores and values
  (with a window, T is at most the window).

  Follows PaLM (arXiv 2204.02311, appendix B): causal masking is not deducted, and neither recomputation nor the
  dispatch of sparse layers is counted. With a mixture of depths, its `share` of the tokens goes through a routed layer.
  """
  if model.multi_token_depth:
    # Each module has one layer, a projection, and logits.
    of_module = flops_per_token(model.last_layer, sequence_length) + 6 * 2 * model.d_model * model.d_model
    return flops_per_token(model.main, sequence_length) + model.multi_token_depth * of_module
  if model.depths.is_routed:
    all_tokens = dataclasses.replace(model, depths=Depths())
    return flops_per_token(all_tokens, sequence_length) + _routed_flops(model, sequence_length)
  biases = _vectors(model) + _expert_biases(model, model.moe.experts_per_token if model.moe else 0)
  matrices = parameter_counts(model).active_non_embedding - biases + model.vocab_size * model.d_model
  attention = model.sum_of_attention(lambda attention: attention.score_flops_per_token(model, sequence_length))
  # A custom feed-forward layer may use a parameter more or less than once per token.
  feed_forward = model.feed_forward.flops_per_token(model.d_model, model.d_ff, model.is_gated)
  others = (model.num_layers - model.num_sparse_layers) * (feed_forward - 6 * _dense_feed_forward(model))
  return 6 * matrices + attention + others


def flops_per_token_at(model: Model, sequence_length: int, choices_per_token: float | None) -> float:
  """`flops_per_token` if experts process `choices_per_token` choices per token on average (None without sparse layers).

  This is less than experts_per_token if choices are dropped at capacity or if top_p selects fewer experts. Dropped
  choices need no FLOPs.
  """
  flops = flops_per_token(model, sequence_length)
  if model.moe is None or choices_per_token is None:
    return flops
  expert = tokens_through_sparse_layers(model, sequence_length) * _expert(model, model.moe.d_ff)
  return flops + 6 * expert * (choices_per_token - model.moe.experts_per_token)


def tokens_through_sparse_layers(model: Model, sequence_length: int) -> float:
  """Sum over sparse layers of the part of the tokens that goes through each, with those of multi-token prediction."""
  part = model.depths.slots(sequence_length) / sequence_length
  return sum(part if is_routed else 1 for is_routed in model.routed_sparse_layers) + model.multi_token_depth


def accepted_choices(experiment: Experiment) -> float | None:
  """Mean number of choices per token that are not dropped if the load is balanced, or None without sparse layers.

  Choices are dropped if the capacity or the receive buffer is smaller than the balanced load.
  """
  model, mesh = experiment.model, experiment.mesh
  if model.moe is None:
    return None
  moe, group_tokens = model.moe, model.moe.group_tokens(experiment.data.sequence_length)
  choices = moe.choices_per_token(group_tokens)
  if moe.dispatch.has_capacity:
    return min(choices, moe.num_experts * moe.capacity(group_tokens) / group_tokens)
  receive_factor = moe.dispatch.receive_factor if isinstance(moe.dispatch, GroupedDispatch) else None
  return choices * min(1.0, receive_factor or 1.0) if mesh.expert > 1 else choices


def tokens_per_step(experiment: Experiment) -> int:
  """Number of tokens in the batch of one optimizer step, including padding."""
  return experiment.training.batch_size * experiment.data.sequence_length


def budget_tokens(model: Model, budget: Budget) -> int:
  """Number of training tokens of `model` in this budget. Modules for multi-token prediction are not counted."""
  return math.ceil(budget.tokens_per_parameter * parameter_counts(model.main).counted(budget.parameters))


def full_sequence_steps(experiment: Experiment) -> int:
  """Number of optimizer steps: training.steps or, if it is None, the steps of the budget without any padding.

  `TargetCounter.steps` takes the padding of a corpus into account.
  """
  training = experiment.training
  return training.steps or math.ceil(budget_tokens(experiment.model, training.budget) / tokens_per_step(experiment))
