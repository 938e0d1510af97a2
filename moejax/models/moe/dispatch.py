"""How tokens reach their experts and come back: GShard's capacity masks, sharded as Table 1 of arXiv 2405.15052.

O outer batch  U routing groups  M tokens in a group  D embed  E experts  A experts per token  C capacity
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.config.moe import MoE, Priority
from moejax.models.moe.router import Routing
from moejax.partitioning import Partitioner

Experts = Callable[[jax.Array], jax.Array]
"""x_OEUCD to x_OEUCD: each expert on its own rows."""


def einsum_dispatch(
  x_OUMD: jax.Array, routing: Routing, experts: Experts, moe: MoE, partitioner: Partitioner
) -> tuple[jax.Array, jax.Array]:
  """Sends each token to its experts and adds up what they return.

  The mesh axis `expert` shards U outside the experts and E inside: the constraints before and after `experts` make
  the two re-shards all-to-alls. A choice beyond an expert's capacity is dropped and adds nothing to its token.

  Returns:
    out_OUMD, and the dropped part of all choices, a float32 scalar.
  """
  place = partitioner.constrain
  O, U, M, _ = x_OUMD.shape
  with jax.named_scope("dispatch"):
    slots_OUMA, kept_OUMA = capacity_slots(routing, moe.num_experts, moe.capacity, moe.priority)
    mask_shape = (O, U, M, moe.num_experts, moe.capacity)
    mask_names = ("outer", "groups", "group_tokens", None, "capacity")
    kept = kept_OUMA.astype(x_OUMD.dtype)
    dispatch_OUMEC = place(_scatter(slots_OUMA, kept, mask_shape), *mask_names)
    x_OUECD = jnp.einsum("OUMEC,OUMD->OUECD", dispatch_OUMEC, x_OUMD)
    x_OEUCD = place(x_OUECD.swapaxes(1, 2), "outer", "experts", None, "capacity", "act_embed")
  x_OEUCD = place(experts(x_OEUCD), "outer", "experts", None, "capacity", "act_embed")
  with jax.named_scope("combine"):
    weights = routing.weights_OUMA.astype(x_OUMD.dtype) * kept
    combine_OUMEC = place(_scatter(slots_OUMA, weights, mask_shape), *mask_names)
    x_OUECD = place(x_OEUCD.swapaxes(1, 2), "outer", "groups", None, "capacity", "act_embed")
    out_OUMD = jnp.einsum("OUMEC,OUECD->OUMD", combine_OUMEC, x_OUECD)
    out_OUMD = place(out_OUMD, "outer", "groups", "group_tokens", "act_embed")
  chosen = jnp.maximum(jnp.sum(routing.valid_OUM) * kept_OUMA.shape[-1], 1)
  return out_OUMD, 1.0 - jnp.sum(kept_OUMA) / chosen


def capacity_slots(
  routing: Routing, num_experts: int, capacity: int, priority: Priority
) -> tuple[jax.Array, jax.Array]:
  """The row that each choice gets among the E x C rows of its group, and whether it gets one.

  Rows go to all first choices in the order of their tokens, then to all second choices, and so on (GShard, arXiv
  2006.16668, algorithm 1), or to all choices of the first token, then of the second, and so on.

  Returns:
    slots_OUMA: expert x C + row, int32; kept_OUMA: bool, False for padding and for choices beyond the capacity.
  """
  O, U, M, A = routing.experts_OUMA.shape
  chosen_OUMAE = jax.nn.one_hot(routing.experts_OUMA, num_experts, dtype=jnp.int32)
  chosen_OUMAE = chosen_OUMAE * routing.valid_OUM[..., None, None]
  first_come = chosen_OUMAE if priority == "token" else chosen_OUMAE.swapaxes(2, 3)
  in_line_OURE = first_come.reshape(O, U, M * A, num_experts)
  before_OURE = jnp.cumsum(in_line_OURE, axis=2) - in_line_OURE
  row = jnp.sum(before_OURE * in_line_OURE, axis=-1).reshape(first_come.shape[:-1])
  row_OUMA = row if priority == "token" else row.swapaxes(2, 3)
  kept_OUMA = (row_OUMA < capacity) & routing.valid_OUM[..., None]
  return routing.experts_OUMA * capacity + row_OUMA, kept_OUMA


def _scatter(slots_OUMA: jax.Array, values_OUMA: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """mask_OUMEC with each choice's value at its slot: compares with an iota, which fuses, and never scatters."""
  O, U, M, E, C = shape
  rows = jnp.arange(E * C, dtype=slots_OUMA.dtype).reshape(1, 1, 1, -1)
  mask = jnp.zeros((O, U, M, E * C), values_OUMA.dtype)
  for a in range(slots_OUMA.shape[-1]):  # A is small; one fused pass, where a one-hot of all would hold A masks
    at_slot = slots_OUMA[..., a, None] == rows
    mask = mask + jnp.where(at_slot, values_OUMA[..., a, None], jnp.zeros((), values_OUMA.dtype))
  return mask.reshape(shape)
