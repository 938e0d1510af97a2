"""Estimates step time and memory by a formula. A search uses it to rank configurations, and a plan uses it if the
program does not fit in memory.

Parameters, gradients and each moment of the optimizer have 4 bytes per element, or 2 for a first moment in bfloat16.
Activations and gathered weights have 2.
"""

import dataclasses
import math

from moejax.config.attention import Attention
from moejax.config.chips import Chip
from moejax.config.depths import Depths
from moejax.config.dispatch import DenseDispatch, GroupedDispatch
from moejax.config.experiment import Experiment
from moejax.config.model import Model
from moejax.config.parameters import (
  flops_per_token,
  parameter_counts,
  tokens_per_step,
  tokens_through_sparse_layers,
)
from moejax.config.precision import Operands
from moejax.config.remat import values_of
from moejax.config.sharding import shards
from moejax.kernels.attention import parts_before
from moejax.planning.activations import (
  exchange_buffers,
  hidden_per_token,
  recomputed,
  saved_bytes,
  saved_on_device,
)
from moejax.planning.host_copies import HOST_BANDWIDTH, exposed_by_formula
from moejax.planning.kernels import LANES, TRITON_ATTENTION, VECTOR_OPERATIONS, product_speedup
from moejax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Constants:
  """What the formula is fitted with."""

  utilisation: float
  """Fraction of the peak of the matrix units that matrix products reach."""
  hidden: float
  """Maximum fraction of the time of collectives that is hidden by products."""
  beside: float
  """Fraction of the time of products during which collectives can overlap."""


UTILISATION = {"v4": 0.7, "v5e": 0.785, "v5p": 0.73, "v6e": 0.635, "tpu7x": 0.74, "h100": 0.46, "h200": 0.6}
OTHERS = Constants(utilisation=0.53, hidden=0.9, beside=0.6)
"""Fitted to published runs: the utilisation by chip, and the constants of a GPU without runs, which differ from those
of the other chips only in the utilisation. `python docs/ledger.py ROWS.jsonl --fit` prints them."""

GROUPED = {"tpu": 4.0, "gpu": 1.9}
"""Time of a FLOP of a dropless grouped product, in which the rows of each expert are padded to tiles, relative to one
of a large product.

On GPU, this is cuBLAS against the grouped products of `moejax.planning.kernels`: 0.79 to 0.42 of the peak. On TPU, it
includes what surrounds the product and is not priced otherwise (sorting, copies of rows, buffers for uneven load): 6
from the published run of Llama 4 Maverick, 2.9 and 1.6 from the compiled programs of Qwen3 235B and Llama 4 Scout, and
4.7 from the 20 hours after which OLMoE overtook a dense model on 128 v5e chips. 8 bits shorten the product, which is 1
of the 4 there."""

PASSES = 3
"""Passes over the activations of a layer outside products: forward, recomputed or saved, and backward."""

COPIES = {"tpu": (2, 4), "gpu": (2, 3)}
"""Bytes per parameter of copies in the compute type, and what gradient accumulation adds for the gradients of the
microbatches before. The experts of dropless layers are not copied.

These and the next two are fitted to compiled programs. Of the 36 for v5p in tests/planning/programs/searched.jsonl, the
median error is 1 %, and the largest is 3 %. Of programs for TPU that they are not fitted to, up to 8 % are missing
(`python docs/pods.py --memory`). Of the 20 for GPU of docs/pods.md and docs/ledger.jsonl with fused attention, the
errors are 3 % and 13 %."""

IN_LAYER = {"tpu": 5, "gpu": 6}
"""Bytes per number inside a layer."""

IN_LOGITS = {"tpu": 4, "gpu": 6}
"""Bytes per logit: in float32, and on GPU their gradient in bfloat16, which TPUs compute within its two products."""

REDUCES_TWICE = ("v4", "v5e", "v5p", "v6e")
"""TPUs for which libtpu sums gradients over all chips of a slice by an all-reduce, which moves twice the bytes of the
reduce-scatter that it uses over fewer chips."""


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Step time and memory of one device."""

  step_time_s: float
  memory_by_group: dict[str, float]
  """Bytes of parameters, gradients, moments, copies, activations, gathered_weights, exchange_buffers and logits. Those
  that are not held at the peak are 0."""
  saved_activations: float
  """Bytes of the activations that the forward pass saves for the backward pass, in one part of the batch."""

  @property
  def memory_bytes(self) -> float:
    return sum(self.memory_by_group.values())


def estimate(
  experiment: Experiment,
  topology: Topology,
  constants: Constants | None = None,
  gpu_attention: float = TRITON_ATTENTION,
) -> Estimate:
  """Estimates memory and step time: products, attention, passes over memory and the update, and the collectives that
  products do not hide.

  Args:
    experiment: its step is estimated.
    topology: the devices.
    constants: those of the chip if None.
    gpu_attention: fraction of peak that attention reaches on a GPU. By default, that of moejax's kernel.
  """
  model, mesh, chip = experiment.model, experiment.mesh, topology.chip
  if constants is None:
    constants = dataclasses.replace(OTHERS, utilisation=UTILISATION.get(chip.name, OTHERS.utilisation))
  tokens = tokens_per_step(experiment) / mesh.size
  split = _split(model)
  rate = constants.utilisation * (chip.bfloat16_flops or chip.vector_flops)
  part = _part_of_depths(experiment)
  products_s = part * tokens * _product_flops(experiment, chip) / rate
  other_s = part * tokens * _attention_s(experiment, chip, gpu_attention) + _passes_s(experiment, chip, part * tokens)
  moved_s = _moved_s(experiment, topology, tokens, split)
  hidden_s = min(constants.hidden * moved_s, constants.beside * products_s)
  of_part = tokens * mesh.model / experiment.training.gradient_accumulation
  step_time_s = products_s + other_s + moved_s - hidden_s
  return Estimate(
    step_time_s + _host_s(experiment, chip, of_part, split, step_time_s),
    _memory(experiment, chip, of_part, *split),
    sum(saved_bytes(experiment, of_part).values()),
  )


def _part_of_depths(experiment: Experiment) -> float:
  """FLOPs with a mixture of depths, relative to those if every token went through every layer."""
  model, length = experiment.model, experiment.data.sequence_length
  of_all = dataclasses.replace(model, depths=Depths())
  return flops_per_token(model, length) / flops_per_token(of_all, length)


def _split(model: Model) -> tuple[float, float]:
  """Parameters outside routed experts, and in them."""
  moe = model.moe
  experts = (
    _sparse_layers(model) * moe.num_experts * model.feed_forward_matrices * model.d_model * moe.d_ff if moe else 0
  )
  return parameter_counts(model).total - experts, experts


def _product_flops(experiment: Experiment, chip: Chip) -> float:
  """FLOPs per token of all products except those of attention scores, each as many as take its time in bfloat16.

  The backward pass recomputes all products but the last of each layer, whose result it does not need, or those whose
  results are not saved.
  """
  model, precision = experiment.model, experiment.model.precision

  def at(flops: float, bits: Operands) -> float:
    faster = bits != "compute" and chip.platform != "cpu"
    return flops / (product_speedup(chip, bits) if faster else 1.0)

  depth = model.multi_token_depth
  projections = sum(count * one.matrix_parameters(model) for one, count in _attention_layers(model))
  projections += depth * 2 * model.d_model * model.d_model
  dense = (model.num_layers + depth - _sparse_layers(model)) * model.feed_forward.parameters(
    model.d_model, model.d_ff, model.is_gated
  )
  routed = 0.0
  if moe := model.moe:
    expert = _sparse_layers(model) * model.feed_forward_matrices * model.d_model * moe.d_ff
    dense += moe.num_shared_experts * expert
    # The formula prices the balanced load, not the whole receive buffer of a dropless layer.
    grouped = GROUPED.get(chip.platform, 1.0) if isinstance(moe.dispatch, GroupedDispatch) else 1.0
    rows = moe.num_experts if isinstance(moe.dispatch, DenseDispatch) else moe.experts_per_token
    routed = expert * rows * (moe.capacity_factor if moe.dispatch.has_capacity else grouped)
  again = recomputed(model)
  kept = 1 - 1 / model.feed_forward_matrices
  logits = 3 * (1 + depth) * model.vocab_size * model.d_model * (4 / 3 if model.logit_chunks > 1 else 1)
  products = (
    at((3 + again[0]) * projections, precision.attention)
    + at((3 + again[1] * kept) * dense, precision.feed_forward)
    + (3 + again[2] * kept) * routed / _faster_routed(experiment, chip, again[2] * kept)
    + at(logits, precision.logits)
  )
  return 2 * products + _of_masks(experiment)


def _faster_routed(experiment: Experiment, chip: Chip, again: float) -> float:
  """What 8-bit products divide the time of routed experts by. `again` is the part of the forward pass that the
  backward pass computes again."""
  moe, bits = experiment.model.moe, experiment.model.precision.experts
  if moe is None or bits == "compute" or chip.platform == "cpu":
    return 1.0
  whole = product_speedup(chip, bits)
  if not isinstance(moe.dispatch, GroupedDispatch):
    return whole
  # On TPU the product is a part of the time. On GPU both products of the backward pass mix types of fp8, and are in
  # bfloat16 (`moejax/kernels/grouped_matmul_gpu.py`).
  part = 1 / GROUPED["tpu"] if chip.platform == "tpu" else (1 + again) / (3 + again) if bits == "fp8" else 1.0
  return 1 / (1 - part + part / whole)


def _attention_s(experiment: Experiment, chip: Chip, gpu_attention: float) -> float:
  """Seconds per token of scores and values in the fused kernels that plans price (`moejax.planning.kernels`), whose
  vector operations on TPU are not hidden by their products."""
  model, T = experiment.model, experiment.data.sequence_length
  # Two products, and again, and three and four.
  passes = 3 if model.remat == "none" or "context" in model.saved_values else 4
  products = 9 + 2 * (passes - 3)
  seconds = 0.0
  for attention, count in _attention_layers(model):
    seen = _keys_seen(attention, model, T)
    scores = model.num_heads * seen * (1 - seen / (2 * T))
    head = max(model.head_dim, _score_width(attention, model, T))
    if chip.platform == "gpu":
      seconds += count * 2 * products * scores * head / (gpu_attention * (chip.bfloat16_flops or chip.vector_flops))
      continue
    padded = math.ceil(head / LANES) * LANES
    seconds += count * 2 * products * scores * padded / (chip.bfloat16_flops or chip.vector_flops)
    seconds += count * passes * VECTOR_OPERATIONS * scores / chip.vector_flops
  return seconds


def _score_width(attention: Attention, model: Model, T: int) -> float:
  """Dimensions of a head in the products of scores and values or, with a window, the part of them that its keys take
  of all."""
  return attention.score_flops_per_token(model, T) / 12 / model.num_heads / T


def _keys_seen(attention: Attention, model: Model, T: int) -> float:
  """The largest number of keys that a token attends to."""
  return min(T, T * _score_width(attention, model, T) / model.head_dim)


def _attention_layers(model: Model) -> list[tuple[Attention, int]]:
  """The attention layers of a period and the number of each, and those of multi-token prediction."""
  of_period = model.attention_layers
  return [(one, model.num_periods) for one in of_period] + [(of_period[-1], model.multi_token_depth)]


def _sparse_layers(model: Model) -> int:
  """Number of sparse layers, with those of multi-token prediction."""
  return model.num_sparse_layers + (model.multi_token_depth if model.moe else 0)


def _passes_s(experiment: Experiment, chip: Chip, tokens: float) -> float:
  """Seconds of what memory bandwidth limits: norms, activations and residuals, the rows that sparse layers sort, logits
  in float32, and the optimizer's update."""
  model, mesh = experiment.model, experiment.mesh
  of_layer = 8 * model.d_model + 1.5 * hidden_per_token(experiment)
  if model.moe and isinstance(model.moe.dispatch, GroupedDispatch):
    of_layer += 4 * model.moe.experts_per_token * model.d_model / model.moe.every
  layers, logits = model.num_layers + model.multi_token_depth, 1 + model.multi_token_depth
  passed = 2 * PASSES * layers * of_layer + 4 * 4 * logits * model.vocab_size
  dense, experts = _split(model)
  own = dense / shards(experiment.rules, mesh, "embed")
  own += experts / mesh.expert / shards(experiment.rules, mesh, "expert_embed")
  return (tokens * passed + 28 * own / mesh.model) / chip.hbm_bandwidth


def _moved_s(experiment: Experiment, topology: Topology, tokens: float, split: tuple[float, float]) -> float:
  """Seconds of all collectives, if nothing hid them: gathers of weights, reductions of their gradients, exchanges of
  tokens, reductions over `model`, and sums of gradients over replicas."""
  model, mesh, rules, chip = experiment.model, experiment.mesh, experiment.rules, topology.chip
  dense, experts = split
  moe = model.moe
  of_gradient = 4 if model.gradient_dtype == "float32" else 2
  per_slice = topology.devices // topology.slices

  def gathered(parameters: float, ways: int, stride: int) -> float:
    """Seconds to gather weights in both passes and to reduce their gradients, over these shards."""
    passes = 2 if ways == per_slice and chip.name in REDUCES_TWICE else 1
    size = (2 + 2 + passes * of_gradient) * parameters * (1 - 1 / ways)
    return experiment.training.gradient_accumulation * size / _rate(chip, ways, stride)

  embed, of_experts = shards(rules, mesh, "embed"), shards(rules, mesh, "expert_embed")
  moved = gathered(dense / mesh.model, embed, mesh.model)
  own = dense / (embed * mesh.model)
  if moe:
    moved += gathered(experts / (mesh.expert * mesh.model), of_experts, mesh.model * mesh.expert)
    own += experts / (mesh.expert * mesh.model * of_experts)
    rows = tokens * moe.experts_per_token * (moe.capacity_factor if moe.dispatch.has_capacity else 1.0)
    size = 6 * tokens_through_sparse_layers(model, experiment.data.sequence_length) * rows * model.d_model * 2
    if chip.torus:
      ring = math.ceil(mesh.expert ** (1 / min(2, chip.torus))) if mesh.expert > 1 else 0
      moved += size * ring / (8 * chip.link_bandwidth)
    elif mesh.expert > 1:
      near = min(mesh.expert * mesh.model, chip.domain or 1)
      far = 1 - near / (mesh.expert * mesh.model)
      moved += size * ((1 - far) / chip.link_bandwidth + far / chip.dcn_bandwidth)
  if mesh.model > 1:
    # Four reductions per layer in the forward and backward pass, each of the tokens of this device.
    moved += (
      8
      * (model.num_layers + model.multi_token_depth)
      * tokens
      * mesh.model
      * model.d_model
      * 2
      / _rate(chip, mesh.model, 1)
    )
  if mesh.context > 1:
    # Keys and values of other parts of the sequences, in the forward pass and again, and their gradients.
    heads = model.num_kv_heads / math.gcd(mesh.model, model.num_kv_heads)
    size = 3 * tokens * mesh.model * 2 * heads * model.head_dim * 2
    parts = sum(count * _parts_received(experiment, one, chip) for one, count in _attention_layers(model))
    moved += parts * size / _rate(chip, mesh.context, mesh.model)
    if "context" not in dict(rules)["embed"]:
      moved += 2 * (1 - 1 / mesh.context) * of_gradient * own / _rate(chip, mesh.context, mesh.model)
  near = max(1, mesh.replica // topology.slices)
  inside = chip.link_bandwidth * max(1, 2 * chip.torus) if chip.torus else chip.dcn_bandwidth
  if not chip.torus and mesh.size <= (chip.domain or 1):
    inside = chip.link_bandwidth
  moved += 2 * (1 - 1 / near) * of_gradient * own / inside
  return moved + 2 * (1 - 1 / topology.slices) * of_gradient * own / chip.dcn_bandwidth


def _parts_received(experiment: Experiment, attention: Attention, chip: Chip) -> int:
  """The number of other parts of the sequences that a layer gathers, or as many as take the time in which it gets them
  from the device before: in one direction of a ring, whose two directions a gather uses."""
  parts, T = experiment.mesh.context, experiment.data.sequence_length
  seen = round(_keys_seen(attention, experiment.model, T))
  before = parts_before(T // parts, parts, seen if seen < T else None)
  return parts - 1 if before is None else before * (2 if chip.torus else 1)


def _rate(chip: Chip, ways: int, stride: int) -> float:
  """Bytes per second at which a device gathers from this many devices, which are `stride` apart: both directions of all
  rings of a torus, or the switch and, between its domains, the part of the network that each of its devices has."""
  if chip.torus:
    return 2 * chip.link_bandwidth * chip.torus
  near = max(1, (chip.domain or 1) // stride)
  if ways <= near:
    return chip.link_bandwidth
  return 1 / (1 / chip.link_bandwidth + 1 / (near * chip.dcn_bandwidth))


def _of_masks(experiment: Experiment) -> float:
  """FLOPs per token of products with dispatch masks."""
  model, moe = experiment.model, experiment.model.moe
  if moe is None or not moe.dispatch.has_masks:
    return 0.0
  rows = moe.experts_per_token * moe.capacity_factor
  masks = 12 * model.d_model * rows * moe.group_tokens(experiment.data.sequence_length)
  return _sparse_layers(model) * masks


def _memory(
  experiment: Experiment, chip: Chip, tokens: float, dense_parameters: float, expert_parameters: float
) -> dict[str, float]:
  """Bytes by group at the peak, which is either within a layer or at the logits. `tokens` is the number of tokens of a
  microbatch on one device."""
  model, mesh, own = experiment.model, experiment.mesh, _own(experiment, dense_parameters, expert_parameters)
  dropless = model.moe and isinstance(model.moe.dispatch, GroupedDispatch)
  platform = "gpu" if chip.platform == "gpu" else "tpu"
  copies, of_parts = COPIES[platform]
  in_parts = experiment.training.gradient_accumulation > 1
  copied = (copies + of_parts * in_parts) * (_own(experiment, dense_parameters, 0.0) if dropless else own)
  of_gradient = 4 if model.gradient_dtype == "float32" else 2
  layer = 2 * dense_parameters / model.num_layers / mesh.model
  if model.moe:
    of_experts = expert_parameters / _sparse_layers(model) / (mesh.expert * mesh.model)
    layer += 2 * of_experts
    if dropless:
      copied += in_parts * of_gradient * _own(experiment, 0.0, expert_parameters)  # those of a microbatch
      if shards(experiment.rules, mesh, "expert_embed") > 1:
        # The gradients of a whole layer before their sum. On GPU, the gathered matrices before they are transposed.
        layer += (of_gradient + 2 * (chip.platform == "gpu")) * of_experts
  of_layer = {
    "of_layer": IN_LAYER[platform] * tokens * (model.d_model + hidden_per_token(experiment) / mesh.model),
    "gathered_weights": layer,
    "exchange_buffers": exchange_buffers(experiment, tokens),
    "gradients": 4 * own,
  }
  # The output projection is gathered, a part of it in a second layout, and its gradient is whole before it is summed
  # over devices. With chunks of logits, so is the sum of the gradients of the chunks before.
  per_logit, per_weight = IN_LOGITS[platform] / model.logit_chunks, 3 + of_gradient + 4 * (model.logit_chunks > 1)
  of_logits = {
    "logits": (per_logit * tokens + per_weight * model.d_model) * model.vocab_size / mesh.model,
    # XLA for TPU allocates the other gradients when the backward pass through the layers begins.
    "gradients": 0.0 if platform == "tpu" else 4 * own,
  }
  at_peak = max(of_layer, of_logits, key=lambda groups: sum(groups.values()))
  return {
    "parameters": 4 * own,
    "moments": 0.0 if experiment.optimizer.offload_moments else experiment.optimizer.moment_bytes * own,
    "copies": copied,
    "activations": saved_on_device(experiment, tokens) + at_peak.pop("of_layer", 0.0),
    **dict.fromkeys(("gradients", "gathered_weights", "exchange_buffers", "logits"), 0.0),
    **at_peak,
  }


def _own(experiment: Experiment, dense_parameters: float, expert_parameters: float) -> float:
  """Number of parameters that one device has."""
  mesh, rules = experiment.mesh, experiment.rules
  embed, experts = shards(rules, mesh, "embed"), mesh.expert * shards(rules, mesh, "expert_embed")
  return (dense_parameters / embed + expert_parameters / experts) / mesh.model


def _host_s(experiment: Experiment, chip: Chip, tokens: float, split: tuple[float, float], step_time_s: float) -> float:
  """Seconds of a step that wait for what the experiment keeps in the memory of the host."""
  rate = HOST_BANDWIDTH.get(chip.name)
  if rate is None:
    return 0.0
  saved = saved_bytes(experiment, tokens)
  moved = sum(saved.get(name, 0.0) for name in values_of(experiment.model.offload_activations))
  activations_s = moved * experiment.training.gradient_accumulation / rate
  offloads = experiment.optimizer.offload_moments
  moments = experiment.optimizer.moment_bytes * _own(experiment, *split) if offloads else 0.0
  return exposed_by_formula(activations_s, moments / rate, step_time_s)
