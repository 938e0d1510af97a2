"""The functions of dispatches, which move tokens to their experts and back.

einsum  GShard's capacity masks, sharded as Table 1 of arXiv 2405.15052; drops what is beyond the capacity
grouped rows sorted by expert (`grouped.py`); drops nothing
dense   every expert on every token, as DS-MoE trains (arXiv 2404.05567)

O outer batch  U routing groups  M tokens  D embed  E experts  A experts per token  C capacity
R routed rows

An expert has R = U x C rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config.dispatch import DenseDispatch, Dispatch, EinsumDispatch, GroupedDispatch, Priority
from moejax.config.kinds import described, function_of, running
from moejax.config.moe import MoE
from moejax.config.remat import ROUTER
from moejax.errors import UserError
from moejax.models.moe.experts import Experts
from moejax.models.moe.grouped import grouped_dispatch
from moejax.models.moe.routing import Routing
from moejax.models.remat import keep, of_kept
from moejax.models.returned import check_returned, shown
from moejax.partitioning import Partitioner


def einsum_dispatch(
  config: EinsumDispatch, x_OUMD: jax.Array, routing: Routing, experts: Experts, moe: MoE, partitioner: Partitioner
) -> tuple[jax.Array, jax.Array]:
  """Sends each token to its experts by a product with a mask, and sums their outputs by a product with another mask.

  The mesh axis `expert` shards U outside the experts and E inside: the constraints before and after `experts` make
  the two re-shards all-to-alls. A choice beyond an expert's capacity is dropped and adds nothing to its token.
  """
  constrain = partitioner.constrain
  O, U, M, D = x_OUMD.shape
  E, C = moe.num_experts, moe.capacity(M)
  mask_names = ("outer", "groups", "group_tokens", None, "capacity")
  with jax.named_scope("dispatch"):
    row_OUME = keep(capacity_rows(routing, E, config.priority), ROUTER)
    is_row_OUMEC = row_OUME[..., None] == jnp.arange(C).reshape(1, 1, 1, 1, -1)
    dispatch_OUMEC = constrain(is_row_OUMEC.astype(x_OUMD.dtype), *mask_names)  # 0 and 1 are exact in every type
    x_OUECD = jnp.einsum("OUMEC,OUMD->OUECD", dispatch_OUMEC, x_OUMD)
    # All rows of an expert are one dimension before the all-to-all: C alone would be padded to a tile on the links.
    x_OERD = constrain(x_OUECD.swapaxes(1, 2).reshape(O, E, U * C, D), "outer", None, "groups", "act_embed")
    x_OERD = constrain(x_OERD, "outer", "experts", None, "act_embed")
  x_OERD = experts.on_capacity(x_OERD)
  with jax.named_scope("combine"):
    weights_OUME = routing.weights_OUME(E).astype(x_OUMD.dtype)
    combine_OUMEC = constrain(
      jnp.where(is_row_OUMEC, weights_OUME[..., None], jnp.zeros((), x_OUMD.dtype)), *mask_names
    )
    x_OERD = constrain(x_OERD, "outer", "experts", None, "act_embed")
    x_OERD = constrain(x_OERD, "outer", None, "groups", "act_embed")
    x_OUECD = x_OERD.reshape(O, E, U, C, D).swapaxes(1, 2)
    out_OUMD = of_kept(functools.partial(jnp.einsum, "OUECD,OUMEC->OUMD"), "experts_out")(x_OUECD, combine_OUMEC)
    out_OUMD = constrain(out_OUMD, "outer", "groups", "group_tokens", "act_embed")
  return out_OUMD, jnp.sum(row_OUME >= C, axis=(2, 3))


def dense_dispatch(
  config: DenseDispatch, x_OUMD: jax.Array, routing: Routing, experts: Experts, moe: MoE, partitioner: Partitioner
) -> tuple[jax.Array, jax.Array]:
  """All experts as one wide layer, whose hidden units are scaled by the weights of a token."""
  out_OUMD = experts.on_all(x_OUMD, routing.weights_OUME(moe.num_experts))
  return partitioner.constrain(out_OUMD, "outer", "groups", "group_tokens", "act_embed"), jnp.zeros(x_OUMD.shape[:2])


Run = Callable[[Any, jax.Array, Routing, Experts, MoE, Partitioner], tuple[jax.Array, jax.Array]]
"""Maps (configuration of the dispatch, x_OUMD, routing, experts, sparse layer, partitioner) to out_OUMD and the number
of dropped choices of each group [O, U]."""

DISPATCHES: dict[type[Dispatch], Run] = {
  EinsumDispatch: einsum_dispatch,
  GroupedDispatch: grouped_dispatch,
  DenseDispatch: dense_dispatch,
}
"""Dispatches by class of the configuration. Custom dispatches are added to it."""


def dispatch(
  x_OUMD: jax.Array, routing: Routing, experts: Experts, moe: MoE, partitioner: Partitioner
) -> tuple[jax.Array, jax.Array]:
  """Applies the dispatch of the sparse layer. Returns out_OUMD and the number of dropped choices of each group [O, U].

  Raises:
    UserError: If DISPATCHES has no function for it, or it returns arrays of other shapes or dtypes.
  """
  config = moe.dispatch
  run = function_of(config, DISPATCHES)
  with running(config):
    returned = run(config, x_OUMD, routing, experts, moe, partitioner)
  if not isinstance(returned, tuple) or len(returned) != 2:
    raise UserError(f"{described(type(config))} returned {shown(returned)}, not the tuple (out_OUMD, dropped_OU)")
  check_returned(config, "out_OUMD", returned[0], x_OUMD.shape, x_OUMD.dtype)
  check_returned(config, "dropped_OU", returned[1], x_OUMD.shape[:2], None)
  return returned


def capacity_rows(routing: Routing, num_experts: int, priority: Priority) -> jax.Array:
  """Returns row_OUME: the position of a choice among the rows of the expert in its group, from 0, or -1 for no choice.

  Positions go to all first choices in the order of their tokens, then to all second choices, and so on (GShard, arXiv
  2006.16668, algorithm 1), or to one token after the other with all its choices.
  """
  if priority == "token" or routing.every_expert:
    chosen_OUME = routing.chosen_OUME(num_experts, jnp.int32)
    return jnp.where(chosen_OUME > 0, jnp.cumsum(chosen_OUME, axis=2) - 1, -1)
  row_OUME = jnp.full((*routing.chosen_OUMA.shape[:3], num_experts), -1, jnp.int32)
  before_OU1E = jnp.zeros((*routing.chosen_OUMA.shape[:2], 1, num_experts), jnp.int32)
  experts_E = jnp.arange(num_experts).reshape(1, 1, 1, -1)
  for a in range(routing.chosen_OUMA.shape[-1]):
    chosen_OUME = (routing.experts_OUMA[..., a, None] == experts_E) & routing.chosen_OUMA[..., a, None]
    in_line_OUME = before_OU1E + jnp.cumsum(chosen_OUME.astype(jnp.int32), axis=2)
    row_OUME = jnp.where(chosen_OUME, in_line_OUME - 1, row_OUME)
    before_OU1E = in_line_OUME[:, :, -1:]
  return row_OUME
