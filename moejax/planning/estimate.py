"""Estimates step time and memory by a formula. A search uses it to rank configurations, and a plan uses it if the
program does not fit in memory.

Parameters, gradients and each moment of the optimizer have 4 bytes per element. Activations and gathered weights have
2.
"""

import dataclasses
import math

from moejax.config.dispatch import DenseDispatch, GroupedDispatch
from moejax.config.experiment import Experiment
from moejax.config.model import Model
from moejax.config.optimizer import AdamW
from moejax.config.parameters import flops_per_token, parameter_counts, tokens_per_step
from moejax.config.sharding import shards
from moejax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Constants:
  """What the formula is fitted with."""

  utilisation: float
  """Of the matrix units' peak by products on TPU. GPUs have their own efficiency on top."""
  hidden: float
  """Maximum fraction of the time of collectives that is hidden by products."""
  beside: float
  """Fraction of the time of products during which collectives can overlap."""


FITTED = Constants(utilisation=0.7, hidden=0.9, beside=0.6)
"""Fitted to published runs; `python docs/ledger.py ROWS.jsonl --fit` prints them."""

SMALLEST_SHARD = 64
"""For smaller shards of a weight, the compiler replaces all-gathers by all-reduces."""


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Step time and memory of one device."""

  step_time_s: float
  memory_by_group: dict[str, float]
  """Bytes of parameters, gradients, moments, activations, gathered_weights, exchange_buffers and logits."""
  saved_activations: float
  """Bytes of the activations that the forward pass saves for the backward pass, in one part of the batch."""

  @property
  def memory_bytes(self) -> float:
    return sum(self.memory_by_group.values())


def estimate(
  experiment: Experiment, topology: Topology, constants: Constants = FITTED, speedup: float = 1.0
) -> Estimate:
  """Estimates memory, and the time of products, gathers of weights, exchanges of tokens, reductions over `model` and
  sums of gradients over replicas. Products hide a part of the communication.
  """
  model, mesh, chip = experiment.model, experiment.mesh, topology.chip
  moe = model.moe
  devices = mesh.size
  tokens = tokens_per_step(experiment) / devices
  parts = experiment.training.gradient_accumulation
  counted = parameter_counts(model)
  expert_parameters = (
    model.num_sparse_layers * moe.num_experts * model.feed_forward_matrices * model.d_model * moe.d_ff if moe else 0
  )
  dense_parameters = counted.total - expert_parameters
  per_token = flops_per_token(model, experiment.data.sequence_length) * (1 + _again(experiment))
  low = 6 * _projections(model) * (1 + _again(experiment)) * (1 - 1 / speedup)
  flops = tokens * ((per_token - low) + _of_masks(experiment))
  seconds = flops / (constants.utilisation * (chip.bfloat16_flops or chip.vector_flops))
  link = chip.link_bandwidth * max(1, chip.torus)
  of_gradient = 4 if model.gradient_dtype == "float32" else 2

  def gathered(parameters: float, ways: int) -> float:
    """Seconds to gather weights in both passes and to reduce their gradients, over these shards."""
    thin = 2 if ways > SMALLEST_SHARD else 1
    return 0 if ways == 1 else parts * thin * (2 + 2 + of_gradient) * parameters / link

  embed = shards(experiment.rules, mesh, "embed")
  moved = gathered(dense_parameters / mesh.model, embed)
  if moe:
    moved += gathered(expert_parameters / (mesh.expert * mesh.model), shards(experiment.rules, mesh, "expert_embed"))
    rows = tokens * moe.experts_per_token * (moe.capacity_factor if moe.dispatch.has_capacity else 1.0)
    ring = math.ceil(mesh.expert ** (1 / max(1, min(2, chip.torus)))) if mesh.expert > 1 else 0
    moved += 6 * model.num_sparse_layers * rows * model.d_model * 2 * ring / (8 * chip.link_bandwidth)
  if mesh.model > 1:
    # Four reductions per layer in the forward and backward pass, each of the tokens of this device.
    moved += 8 * model.num_layers * tokens * mesh.model * model.d_model * 2 / link
  own = dense_parameters / (embed * mesh.model)
  if moe:
    own += expert_parameters / (mesh.expert * mesh.model * shards(experiment.rules, mesh, "expert_embed"))
  near = max(1, mesh.replica // topology.slices)
  moved += 2 * (1 - 1 / near) * of_gradient * own / link
  moved += 2 * (1 - 1 / topology.slices) * of_gradient * own / chip.dcn_bandwidth
  of_part = tokens * mesh.model / parts
  memory = _memory(experiment, of_part, dense_parameters, expert_parameters)
  hidden = min(constants.hidden * moved, constants.beside * seconds)
  return Estimate(
    (seconds + moved - hidden) / (chip.efficiency if chip.platform == "gpu" else 1.0),
    memory,
    _saved(experiment, of_part),
  )


def _projections(model: Model) -> int:
  """Parameters of attention, of dense feed-forward layers and of shared experts: what 8-bit products may take."""
  routed = (
    model.moe.experts_per_token * model.feed_forward_matrices * model.d_model * model.moe.d_ff if model.moe else 0
  )
  return parameter_counts(model).active_non_embedding - model.num_sparse_layers * routed


def _of_masks(experiment: Experiment) -> float:
  """FLOPs per token of dispatch masks, and of expert rows beyond (or below) the token's choices."""
  model, moe = experiment.model, experiment.model.moe
  if moe is None or not moe.dispatch.has_masks:
    return 0.0
  rows = moe.experts_per_token * moe.capacity_factor
  masks = 12 * model.d_model * rows * moe.group_tokens(experiment.data.sequence_length)
  experts = 6 * model.feed_forward_matrices * model.d_model * moe.d_ff * (rows - moe.experts_per_token)
  return model.num_sparse_layers * (masks + experts)


def _again(experiment: Experiment) -> float:
  """Fraction of the products that the backward pass recomputes."""
  model = experiment.model
  counted = parameter_counts(model)
  matrices = counted.active_non_embedding + model.vocab_size * model.d_model
  feed_forward = model.feed_forward_matrices * model.d_model
  dense = model.feed_forward.parameters(model.d_model, model.d_ff, model.is_gated)
  of_dense = (model.num_layers - model.num_sparse_layers) * dense
  of_experts = model.num_sparse_layers * feed_forward * model.moe.d_ff * model.moe.experts_per_token if model.moe else 0
  recomputed = {
    "dots": of_experts,
    "attention": of_dense + of_experts,
    "layer_inputs": counted.active_non_embedding,
  }.get(model.remat, 0)
  return recomputed / matrices / 3


def _memory(
  experiment: Experiment, tokens: float, dense_parameters: float, expert_parameters: float
) -> dict[str, float]:
  """Bytes by group. `tokens` is the number of tokens of a microbatch on one device."""
  model, mesh, rules = experiment.model, experiment.mesh, experiment.rules
  embed, experts = shards(rules, mesh, "embed"), mesh.expert * shards(rules, mesh, "expert_embed")
  own = (dense_parameters / embed + expert_parameters / experts) / mesh.model
  moments = 2 if isinstance(experiment.optimizer, AdamW) else 1
  layer = 2 * 2 * (dense_parameters / model.num_layers / mesh.model)
  if model.moe:
    layer += 2 * 2 * expert_parameters / model.num_sparse_layers / (mesh.expert * mesh.model)
  return {
    "parameters": 4 * own,
    "gradients": 4 * own,
    "moments": 4 * moments * own,
    "activations": _saved(experiment, tokens) + 12 * tokens * (model.d_model + _wide(experiment) / mesh.model),
    "gathered_weights": layer,
    "exchange_buffers": _exchange_buffers(experiment, tokens),
    "logits": 3 * 4 * tokens * model.vocab_size / mesh.model / model.logit_chunks,
  }


def _saved(experiment: Experiment, tokens: float) -> float:
  """Bytes that the forward pass saves on one device for the backward pass."""
  model, mesh = experiment.model, experiment.mesh
  heads, wide = (model.num_heads + model.num_kv_heads) * 2 * model.head_dim, _wide(experiment)
  within, residual = {  # what `model` shares among devices, and copies of the residual stream, which it does not
    "none": (2 * (heads + wide), 8),
    "products": (heads + wide, 2),
    "dots": (heads + wide * (0.5 if model.moe else 1), 2),
    "attention": (heads, 1),
    "layer_inputs": (0, 0),
  }[model.remat]
  kept = within / mesh.model + (1 + residual) * model.d_model
  return 2 * tokens * model.num_layers * kept


def _wide(experiment: Experiment) -> float:
  """Numbers of one token inside a feed-forward layer, on average over dense and sparse ones."""
  model = experiment.model
  dense = 2.0 * model.d_ff
  if model.moe is None:
    return dense
  return (_rows(experiment) * 2 * model.moe.d_ff + (model.moe.every - 1) * dense) / model.moe.every


def _rows(experiment: Experiment) -> float:
  """Number of rows per token that the experts compute, including padding."""
  moe = experiment.model.moe
  assert moe
  if isinstance(moe.dispatch, DenseDispatch):
    return moe.num_experts
  if moe.dispatch.has_capacity:
    return moe.experts_per_token * moe.capacity_factor
  return moe.experts_per_token * buffer_factor(experiment)


def buffer_factor(experiment: Experiment) -> float:
  """Rows of the receive buffer of a dropless layer divided by the balanced load. The worst case if it is not
  limited."""
  moe, ways = experiment.model.moe, experiment.mesh.expert
  if moe is None or ways == 1 or not isinstance(moe.dispatch, GroupedDispatch) or moe.dispatch.exchange != "all_to_all":
    return 1.0
  per_token = moe.choices_per_token(moe.group_tokens(experiment.data.sequence_length))
  worst = ways * min(moe.experts_per_token, moe.num_experts // ways) / per_token
  return worst if moe.dispatch.receive_factor is None else min(worst, moe.dispatch.receive_factor)


def _exchange_buffers(experiment: Experiment, tokens: float) -> float:
  """Bytes of the rows that one layer sends and receives in the forward and backward pass."""
  moe = experiment.model.moe
  if moe is None or experiment.mesh.expert == 1:
    return 0.0
  return 4 * 2 * tokens * _rows(experiment) * experiment.model.d_model / experiment.mesh.model
