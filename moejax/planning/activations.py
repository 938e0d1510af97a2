"""What the layers of a training step save for the backward pass and compute again in it, by formula, and the rows of
their experts."""

from moejax.config.dispatch import DenseDispatch, GroupedDispatch
from moejax.config.experiment import Experiment
from moejax.config.model import Model
from moejax.config.remat import values_of
from moejax.config.sharding import shards
from moejax.planning.host_copies import STAYING_LAYERS


def saved_bytes(experiment: Experiment, tokens: float) -> dict[str, float]:
  """Bytes that the forward pass saves on one device for the backward pass, by value as in `moejax.config.remat`. Values
  without a name are `others`."""
  model, mesh = experiment.model, experiment.mesh
  of_attention = _value_sizes(model)
  of_dense, of_sparse = _hidden_per_token(experiment)
  before, after = _rows_before_and_after(experiment)
  # What `model` shares among devices, and copies of the residual stream, which the rules share.
  sizes: dict[str, tuple[float, float]] = {
    "layer_inputs": (0, 1),
    **{name: (size, 0) for name, size in of_attention.items()},
    "attention_out": (0, 1),
    "feed_forward_in": (of_dense + _of_shared_experts(model), 0),
    "expert_rows": (0, before),
    "experts_in": (of_sparse, 0),
    "experts_out": (0, after),
  }
  sizes = {name: size for name, size in sizes.items() if name in ("layer_inputs", *model.saved_values)}
  if model.remat == "none":
    sizes["others"] = (2 * (sum(of_attention.values()) + of_dense + of_sparse), 8 + before + after)
  layers = model.num_layers + model.multi_token_depth
  stream = model.d_model / shards(experiment.rules, mesh, "act_embed")
  return {
    name: 2 * tokens * layers * (within / mesh.model + residual * stream) for name, (within, residual) in sizes.items()
  }


def _rows_before_and_after(experiment: Experiment) -> tuple[float, float]:
  """Rows per token that experts receive, where they are exchanged, and return, on average over all layers."""
  moe = experiment.model.moe
  if moe is None or isinstance(moe.dispatch, DenseDispatch):
    return 0.0, 0.0
  if moe.dispatch.has_capacity:
    return (rows_per_token(experiment) / moe.every,) * 2
  return rows_per_token(experiment) * exchanges_rows(experiment) / moe.every, moe.experts_per_token / moe.every


def _of_shared_experts(model: Model) -> float:
  """Numbers of one token inside shared experts, on average over all layers."""
  moe = model.moe
  return (model.feed_forward_matrices - 1) * moe.num_shared_experts * moe.d_ff / moe.every if moe else 0.0


def saved_on_device(experiment: Experiment, tokens: float) -> float:
  """Bytes of `saved_bytes` that are on the device at any time."""
  model = experiment.model
  staying = min(1.0, STAYING_LAYERS / model.num_layers)
  sizes = saved_bytes(experiment, tokens).items()
  return sum(size * (staying if name in values_of(model.offload_activations) else 1.0) for name, size in sizes)


def recomputed(model: Model) -> tuple[float, float, float]:
  """The parts of the projections of attention, and of the products into the hidden layers of dense and of sparse
  layers, that the backward pass computes again."""
  if model.remat == "none":
    return 0.0, 0.0, 0.0
  sizes, saved = _value_sizes(model), model.saved_values
  projections = {name: sizes[name] for name in ("queries", "keys_values", "attention_out")}
  part = 1 - sum(size for name, size in projections.items() if name in saved) / sum(projections.values())
  of_dense, of_sparse = (0.0 if name in saved else 1.0 for name in ("feed_forward_in", "experts_in"))
  return part, of_dense, of_sparse


def _value_sizes(model: Model) -> dict[str, float]:
  """Numbers of one token in the values of attention (`moejax.config.remat`)."""
  queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
  return {"queries": queries, "keys_values": 2 * keys, "context": queries, "attention_out": queries}


def hidden_per_token(experiment: Experiment) -> float:
  """Numbers of one token inside a feed-forward layer, on average over dense and sparse ones."""
  return sum(_hidden_per_token(experiment))


def _hidden_per_token(experiment: Experiment) -> tuple[float, float]:
  """The same, of dense layers and of experts."""
  model = experiment.model
  matrices = model.feed_forward_matrices - 1
  dense = float(matrices * model.d_ff)
  if model.moe is None:
    return dense, 0.0
  every = model.moe.every
  return (every - 1) * dense / every, rows_per_token(experiment) * matrices * model.moe.d_ff / every


def rows_per_token(experiment: Experiment) -> float:
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
  if moe is None or not isinstance(moe.dispatch, GroupedDispatch) or not exchanges_rows(experiment):
    return 1.0
  per_token = moe.choices_per_token(moe.group_tokens(experiment.data.sequence_length))
  worst = ways * min(moe.experts_per_token, moe.num_experts // ways) / per_token
  return worst if moe.dispatch.receive_factor is None else min(worst, moe.dispatch.receive_factor)


def exchanges_rows(experiment: Experiment) -> bool:
  """Whether dropless layers send rows to the devices of their experts."""
  dispatch = experiment.model.moe.dispatch if experiment.model.moe else None
  return experiment.mesh.expert > 1 and isinstance(dispatch, GroupedDispatch) and dispatch.exchange == "all_to_all"


def exchange_buffers(experiment: Experiment, tokens: float) -> float:
  """Bytes of the rows that one layer sends and receives in the forward and backward pass."""
  moe = experiment.model.moe
  if moe is None or experiment.mesh.expert == 1:
    return 0.0
  return 4 * 2 * tokens * rows_per_token(experiment) * experiment.model.d_model / experiment.mesh.model
