"""Dropless dispatch: rows sorted by expert, grouped matrix products, and the exchange between expert shards.

O outer batch  U routing groups  M tokens  D embed  F hidden  E experts  A experts per token  R routed rows
X = D or F
A lower-case letter is the size of one device's shard.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config.dispatch import GroupedDispatch
from moejax.config.moe import MoE
from moejax.kernels.grouped_eight_bits import Spread, rounded_grouped_matmul
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.models.moe.exchange import exchange, plan_transfers
from moejax.models.moe.experts import FEW, NAMES, NAMES_OF_BIASES, Experts, Weights
from moejax.models.moe.experts_on_cpu import feed_forward_on_cpu
from moejax.models.moe.few_tokens import visit_experts
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
  """Applies each expert to all rows that chose it, without masks or capacity. Only a receive buffer that is too small
  drops rows.

  Runs on the shard of each device. The weights of the experts are gathered over `expert_embed` here, within what a
  rematerialized layer computes again, so that the weights of at most one layer are whole at a time.
  """

  by_all_to_all = functools.partial(_by_all_to_all, config, moe.choices_per_token(x_OUMD.shape[2]))
  ways: dict[str, Callable] = {"local": _local, "all_to_all": by_all_to_all, "all_gather": _by_all_gather}

  def on_device(
    x_oumd: jax.Array, experts_oumA: jax.Array, weights_oumA: jax.Array, chosen_oumA: jax.Array, weights: Weights
  ) -> tuple[jax.Array, jax.Array]:
    A, d = experts_oumA.shape[-1], x_oumd.shape[-1]
    tokens = [x_oumd.reshape(-1, d), *(x.reshape(-1, A) for x in (experts_oumA, weights_oumA, chosen_oumA))]
    exchanged = bool(partitioner.axes("experts"))
    way, whole = ways[config.exchange if exchanged else "local"], _whole(weights, partitioner)
    chunks = _chunks(tokens, config.exchange_chunks if exchanged else 1)
    outputs, dropped = zip(*(way(*chunk, whole, moe, partitioner) for chunk in chunks), strict=True)
    out_md = jnp.concatenate(outputs)
    total = partitioner.sum_over(sum(dropped, start=jnp.zeros((), jnp.int32)), "group_tokens")
    dropped_ou = jnp.zeros(x_oumd.shape[:2], jnp.int32).at[0, 0].set(total)  # of which group is not known
    return out_md.astype(x_oumd.dtype).reshape(x_oumd.shape), dropped_ou

  weights = experts.weights(x_OUMD.dtype)
  of_matrices = {name: jax.tree.map(lambda _, name=name: NAMES[name], w) for name, w in weights.matrices.items()}
  of_biases: Any = {name: NAMES_OF_BIASES[name] for name in weights.biases}
  names = Weights(of_matrices, of_biases, weights.activation)
  run = partitioner.on_each_device(on_device, (X, TOKENS, TOKENS, TOKENS, names), (X, TOKENS[:2]), exchanging=True)
  return run(x_OUMD, routing.experts_OUMA, routing.weights_OUMA, routing.chosen_OUMA, weights)


def _chunks(tokens: list[jax.Array], count: int) -> Iterator[list[jax.Array]]:
  """Splits arrays of this device's tokens into `count` chunks, whose sizes differ by at most one token. No chunk
  depends on another, so that the compiler can overlap the exchange of one with the products of another."""
  m = len(tokens[0])
  count = max(1, min(count, m))
  bounds = [m * i // count for i in range(count + 1)]
  yield from ([x[begin:end] for x in tokens] for begin, end in itertools.pairwise(bounds))


def _local(
  x_md: jax.Array,
  experts_mA: jax.Array,
  weights_mA: jax.Array,
  chosen_mA: jax.Array,
  weights: Weights,
  moe: MoE,
  partitioner: Partitioner,
) -> tuple[jax.Array, jax.Array]:
  """For a device that has all experts: no row leaves it."""
  x_mD = partitioner.gather(x_md, "act_embed", 1)
  out_mD = _own_experts(x_mD, experts_mA, weights_mA, chosen_mA, weights, partitioner)
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
  """Gathers all tokens on every device, and sums the outputs of the experts over devices."""
  e = len(weights["up"].value)
  x_MD = partitioner.gather(partitioner.gather(x_md, "act_embed", 1), "experts", 0)
  experts_MA, weights_MA, chosen_MA = (partitioner.gather(x, "experts", 0) for x in (experts_mA, weights_mA, chosen_mA))
  own_MA = experts_MA - partitioner.index("experts") * e
  out_MD = _own_experts(x_MD, own_MA, weights_MA, chosen_MA, weights, partitioner)
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
  """Sends each row to the device of its expert and back. `per_token` is the mean number of choices of a token."""
  axis, devices = partitioner.axes("experts"), partitioner.shards("experts")
  m, A = experts_mA.shape
  # A device sends another at most the rows of all its tokens, each to as many experts as the receiver has.
  longest = m * min(A, len(weights["up"].value))
  room = devices * longest
  if config.receive_factor is not None:
    room = min(room, max(1, math.ceil(config.receive_factor * m * per_token - 1e-6)))
  with jax.named_scope("dispatch"):
    order = sort_by_expert(experts_mA, chosen_mA, moe.num_experts, m * A)
    plan = plan_transfers(order.sizes_E, axis, room)
    rows_rd = exchange(take_rows(x_md, order), plan.to_experts, plan.to_tokens, room, longest, axis)
    rows_rD = partitioner.gather(keep(rows_rd, "expert_rows"), "act_embed", 1)
  out_rd = _summed(_feed_forward(rows_rD, plan.sizes_e, weights, partitioner), partitioner)
  with jax.named_scope("combine"):
    out_rd = keep(exchange(out_rd, plan.to_tokens, plan.to_experts, m * A, longest, axis), "experts_out")
    return combine_rows(out_rd, weights_mA, order), plan.dropped


def _own_experts(
  x_MD: jax.Array,
  experts_MA: jax.Array,
  weights_MA: jax.Array,
  chosen_MA: jax.Array,
  weights: Weights,
  partitioner: Partitioner,
) -> jax.Array:
  """Returns the summed outputs of these e experts, numbered from 0, in float32. Choices of other experts add
  nothing."""
  if partitioner.platform == "cpu" and len(x_MD) <= FEW and weights["up"].bits == "compute":
    return _of_few_tokens(x_MD, experts_MA, weights_MA, chosen_MA, weights)
  return _by_rows(x_MD, experts_MA, weights_MA, chosen_MA, weights, partitioner)


def _by_rows(
  x_MD: jax.Array,
  experts_MA: jax.Array,
  weights_MA: jax.Array,
  chosen_MA: jax.Array,
  weights: Weights,
  partitioner: Partitioner | None = None,
) -> jax.Array:
  e = len(weights["up"].value)
  M, A = experts_MA.shape
  with jax.named_scope("dispatch"):
    order = sort_by_expert(experts_MA, chosen_MA, e, M * min(A, e))
    rows_RD = take_rows(x_MD, order)
  out_RD = keep(_feed_forward(rows_RD, order.sizes_E, weights, partitioner), "experts_out")
  with jax.named_scope("combine"):
    return combine_rows(out_RD, weights_MA, order)


_of_few_tokens = jax.custom_vjp(visit_experts)
_of_few_tokens.defvjp(lambda *arrays: jax.vjp(_by_rows, *arrays), lambda pullback, of_out_MD: pullback(of_out_MD))


def _feed_forward(
  rows_RD: jax.Array, sizes_e: jax.Array, weights: Weights, partitioner: Partitioner | None
) -> jax.Array:
  """Applies each expert to its rows; unused rows give zeros. If the hidden dimension is sharded, the result is this
  device's part of the sum. Without a partitioner, the device is a CPU, and products do not round to 8 bits."""
  with jax.named_scope("experts"):
    if weights["up"].bits == "compute" and (partitioner is None or partitioner.platform == "cpu"):
      return feed_forward_on_cpu(rows_RD, sizes_e, weights)
    assert partitioner is not None
    return _by_grouped_products(rows_RD, sizes_e, weights, partitioner)


def _by_grouped_products(
  rows_RD: jax.Array, sizes_e: jax.Array, weights: Weights, partitioner: Partitioner
) -> jax.Array:
  """Computes each product for all rows before the next: on TPU and GPU, and with 8-bit operands."""

  def multiply(rows_RX: jax.Array, weight: Operand, into: bool = True) -> jax.Array:
    if weight.bits == "compute":
      return grouped_matmul(rows_RX, weight.value, sizes_e, wide_EDF=weight.wide)
    spread = _spread(partitioner, into)
    return rounded_grouped_matmul(rows_RX, weight.value, sizes_e, weight.bits, wide_EDF=weight.wide, spread=spread)

  R, e = len(rows_RD), len(sizes_e)
  expert_R = jnp.repeat(jnp.arange(e + 1), jnp.append(sizes_e, R - jnp.sum(sizes_e)), total_repeat_length=R)

  def biased(name: str, rows_RX: jax.Array) -> jax.Array:
    if name not in weights.biases:
      return rows_RX
    return rows_RX + weights.biases[name].at[expert_R].get(mode="fill", fill_value=0)  # unused rows have no expert

  def down(gate_Rf: jax.Array | None, up_Rf: jax.Array) -> jax.Array:
    gate_Rf = None if gate_Rf is None else biased("gate", gate_Rf)
    return biased("down", multiply(weights.activate(gate_Rf, biased("up", up_Rf)), weights["down"], into=False))

  if "gate" not in weights:
    return down(None, keep(multiply(rows_RD, weights["up"]), "experts_in"))
  if weights["up"].shape[-1] < NARROW and weights["up"].bits == "compute":  # rounded rows would share a scale
    side_by_side = lambda *pair: jnp.concatenate(pair, axis=-1)  # noqa: E731
    both_R2f = keep(multiply(rows_RD, jax.tree.map(side_by_side, weights["gate"], weights["up"])), "experts_in")
    gate_Rf, up_Rf = jnp.split(both_R2f, 2, axis=-1)
  else:
    gate_Rf, up_Rf = (keep(multiply(rows_RD, weights[name]), "experts_in") for name in ("gate", "up"))
  return down(gate_Rf, up_Rf)


def _spread(partitioner: Partitioner, into: bool) -> Spread:
  """The mesh axes over which the dimensions of a product into or out of the hidden layer are spread. Each device has
  all of D, and along the expert axis all rows of its experts."""
  of_tokens = dict.fromkeys(axis for name in X[:3] for axis in partitioner.axes(name))
  rows = tuple(axis for axis in of_tokens if axis not in partitioner.axes("experts"))
  hidden = partitioner.axes("expert_mlp")
  return Spread(rows, (), hidden) if into else Spread(rows, hidden, ())


def _whole(weights: Weights, partitioner: Partitioner) -> Weights:
  """The weights of this device's experts, gathered along D. Of devices whose outputs are summed, one has the bias."""
  on_gpu = partitioner.platform == "gpu"

  def gather(name: str, weight: Operand) -> Operand:
    dimension = NAMES[name].index("expert_embed")
    return jax.tree.map(lambda w: partitioner.gather(w, "expert_embed", dimension, apart=on_gpu), weight)

  biases = dict(weights.biases)
  if "down" in biases and partitioner.axes("expert_mlp"):
    biases["down"] = jnp.where(partitioner.index("expert_mlp") == 0, biases["down"], 0)
  matrices = {name: gather(name, weight) for name, weight in weights.matrices.items()}
  return Weights(matrices, biases, weights.activation)


def _summed(x_xD: jax.Array, partitioner: Partitioner) -> jax.Array:
  """Sums over the shards of the hidden dimension, and keeps this device's shard of D if activations are sharded."""
  if partitioner.axes("act_embed"):
    return partitioner.sum_to_shards(x_xD, "act_embed", 1)
  return partitioner.sum_over(x_xD, "expert_mlp")
