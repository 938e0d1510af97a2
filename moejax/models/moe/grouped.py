"""Dropless dispatch: rows sorted by expert, grouped matrix products, and the exchange between devices with experts.

O outer batch  U routing groups  M tokens  D embed  F hidden  E experts  A experts per token  R routed rows
X = D or F
Lower case is a device's own share: oum its tokens, e its experts, d and f its part of a dimension.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.config.dispatch import GroupedDispatch
from moejax.config.moe import MoE
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.models.activations import activate
from moejax.models.moe.exchange import exchange, plan_transfers
from moejax.models.moe.experts import NAMES, Experts, Weights
from moejax.models.moe.routing import TOKENS, Routing
from moejax.models.moe.sorted_rows import combine_rows, sort_by_expert, take_rows
from moejax.models.products import Operand
from moejax.models.remat import keep
from moejax.partitioning import Partitioner

NARROW = 256
"""Hidden width below which gate and up are one product: reading the rows twice costs more than copying the weights."""

X = ("outer", "groups", "group_tokens", "act_embed")


def grouped_dispatch(
  config: GroupedDispatch, x_OUMD: jax.Array, routing: Routing, experts: Experts, moe: MoE, partitioner: Partitioner
) -> tuple[jax.Array, jax.Array]:
  """Each expert on all rows that chose it: no masks, no capacity, no drops but of a receive buffer that is too small.

  Runs on each device's own share. The shards of the experts' weights over `expert_embed` are gathered in here, within
  what a rematerialised layer computes again, so that no more than one layer's weights are whole at a time.
  """

  by_all_to_all = functools.partial(_by_all_to_all, config, moe.choices_per_token(x_OUMD.shape[2]))
  ways: dict[str, Callable] = {"local": _local, "all_to_all": by_all_to_all, "all_gather": _by_all_gather}

  def on_device(
    x_oumd: jax.Array, experts_oumA: jax.Array, weights_oumA: jax.Array, chosen_oumA: jax.Array, weights: Weights
  ) -> tuple[jax.Array, jax.Array]:
    A, d = experts_oumA.shape[-1], x_oumd.shape[-1]
    choices = [x.reshape(-1, A) for x in (experts_oumA, weights_oumA, chosen_oumA)]
    way = ways[config.exchange if partitioner.axes("experts") else "local"]
    out_md, dropped = way(x_oumd.reshape(-1, d), *choices, _whole(weights, partitioner), moe, partitioner)
    dropped = partitioner.sum_over(dropped, "group_tokens")
    dropped_ou = jnp.zeros(x_oumd.shape[:2], jnp.int32).at[0, 0].set(dropped)  # of which group is not known
    return out_md.astype(x_oumd.dtype).reshape(x_oumd.shape), dropped_ou

  weights = experts.weights(x_OUMD.dtype)
  names = {name: jax.tree.map(lambda _, name=name: NAMES[name], weight) for name, weight in weights.items()}
  run = partitioner.on_each_device(on_device, (X, TOKENS, TOKENS, TOKENS, names), (X, TOKENS[:2]), exchanging=True)
  return run(x_OUMD, routing.experts_OUMA, routing.weights_OUMA, routing.chosen_OUMA, weights)


def _local(
  x_md: jax.Array,
  experts_mA: jax.Array,
  weights_mA: jax.Array,
  chosen_mA: jax.Array,
  weights: Weights,
  moe: MoE,
  partitioner: Partitioner,
) -> tuple[jax.Array, jax.Array]:
  """All experts are here: no row leaves the device."""
  x_mD = partitioner.gather(x_md, "act_embed", 1)
  out_mD = _own_experts(x_mD, experts_mA, weights_mA, chosen_mA, weights)
  return _summed(out_mD, partitioner), jnp.zeros((), jnp.int32)


def _by_all_gather(
  x_md: jax.Array,
  experts_mA: jax.Array,
  weights_mA: jax.Array,
  chosen_mA: jax.Array,
  weights: Weights,
  moe: MoE,
  partitioner: Partitioner,
) -> tuple[jax.Array, jax.Array]:
  """All tokens come to every device, which adds what its own experts make of them."""
  e = len(weights["up"].value)
  x_MD = partitioner.gather(partitioner.gather(x_md, "act_embed", 1), "experts", 0)
  experts_MA, weights_MA, chosen_MA = (partitioner.gather(x, "experts", 0) for x in (experts_mA, weights_mA, chosen_mA))
  out_MD = _own_experts(x_MD, experts_MA - partitioner.index("experts") * e, weights_MA, chosen_MA, weights)
  out_mD = partitioner.sum_to_shards(out_MD, "experts", 0)
  return _summed(out_mD, partitioner), jnp.zeros((), jnp.int32)


def _by_all_to_all(
  config: GroupedDispatch,
  per_token: float,
  x_md: jax.Array,
  experts_mA: jax.Array,
  weights_mA: jax.Array,
  chosen_mA: jax.Array,
  weights: Weights,
  moe: MoE,
  partitioner: Partitioner,
) -> tuple[jax.Array, jax.Array]:
  """Each row goes to the device of its expert and comes back. `per_token` is the mean number of a token's choices."""
  axis, devices = partitioner.axes("experts"), partitioner.shards("experts")
  m, A = experts_mA.shape
  # Between two devices go at most the rows of all tokens, each to as many experts as the receiver has.
  longest = m * min(A, len(weights["up"].value))
  room = devices * longest
  if config.receive_factor is not None:
    room = min(room, math.ceil(config.receive_factor * m * per_token - 1e-6))
  with jax.named_scope("dispatch"):
    order = sort_by_expert(experts_mA, chosen_mA, moe.num_experts, m * A)
    plan = plan_transfers(order.sizes_E, axis, room)
    rows_rd = exchange(take_rows(x_md, order), plan.to_experts, plan.to_tokens, room, longest, axis)
    rows_rD = partitioner.gather(keep(rows_rd), "act_embed", 1)
  out_rd = _summed(_feed_forward(rows_rD, plan.sizes_e, weights), partitioner)
  with jax.named_scope("combine"):
    out_rd = keep(exchange(out_rd, plan.to_tokens, plan.to_experts, m * A, longest, axis))
    return combine_rows(out_rd, weights_mA, order), plan.dropped


def _own_experts(
  x_MD: jax.Array, experts_MA: jax.Array, weights_MA: jax.Array, chosen_MA: jax.Array, weights: Weights
) -> jax.Array:
  """out_MD in float32: what these e experts, numbered from 0, make of the tokens; choices of others add nothing."""
  e = len(weights["up"].value)
  M, A = experts_MA.shape
  with jax.named_scope("dispatch"):
    order = sort_by_expert(experts_MA, chosen_MA, e, M * min(A, e))
    rows_RD = take_rows(x_MD, order)
  out_RD = _feed_forward(rows_RD, order.sizes_E, weights)
  with jax.named_scope("combine"):
    return combine_rows(out_RD, weights_MA, order)


def _feed_forward(rows_RD: jax.Array, sizes_e: jax.Array, weights: Weights) -> jax.Array:
  """Each expert on its rows; with the hidden width in shards, this device's part of the sum."""
  with jax.named_scope("experts"):

    def multiply(rows_RX: jax.Array, weight: Operand) -> jax.Array:
      return grouped_matmul(rows_RX, weight.value, sizes_e, wide_EDF=weight.wide)

    if "gate" not in weights:
      return multiply(activate(None, keep(multiply(rows_RD, weights["up"]))), weights["down"])
    if weights["up"].shape[-1] < NARROW:
      side_by_side = lambda *pair: jnp.concatenate(pair, axis=-1)  # noqa: E731
      both_R2f = keep(multiply(rows_RD, jax.tree.map(side_by_side, weights["gate"], weights["up"])))
      gate_Rf, up_Rf = jnp.split(both_R2f, 2, axis=-1)
    else:
      gate_Rf, up_Rf = keep(multiply(rows_RD, weights["gate"])), keep(multiply(rows_RD, weights["up"]))
    return multiply(activate(gate_Rf, up_Rf), weights["down"])


def _whole(weights: Weights, partitioner: Partitioner) -> Weights:
  """This device's experts with the whole of D."""

  def gather(name: str, weight: Operand) -> Operand:
    return jax.tree.map(lambda w: partitioner.gather(w, "expert_embed", NAMES[name].index("expert_embed")), weight)

  return {name: gather(name, weight) for name, weight in weights.items()}


def _summed(x_xD: jax.Array, partitioner: Partitioner) -> jax.Array:
  """The parts of the hidden width added up, into this device's part of D where activations are sharded."""
  if partitioner.axes("act_embed"):
    return partitioner.sum_to_shards(x_xD, "act_embed", 1)
  return partitioner.sum_over(x_xD, "expert_mlp")
