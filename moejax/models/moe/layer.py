"""A sparse feed-forward layer: router, dispatch, experts.

B batch  T position  D embed  O outer batch  U routing groups  M tokens in a group  E experts
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config.model import Model
from moejax.models.layers import weight
from moejax.models.moe.dispatch import einsum_dispatch
from moejax.models.moe.experts import Experts
from moejax.models.moe.router import top_k_softmax
from moejax.partitioning import Partitioner

Auxiliary = dict[str, dict[str, jax.Array]]
"""`losses` and `statistics` of a sparse layer, by name."""


class MoELayer(nnx.Module):
  """x_BTD to x_BTD through each token's own experts."""

  def __init__(self, model: Model, partitioner: Partitioner, rngs: nnx.Rngs):
    assert model.moe
    D, E = model.d_model, model.moe.num_experts
    # Replicated, as in Table 1 of arXiv 2405.15052: every device routes its own tokens.
    self.w_router_DE = weight(rngs, (D, E), (None, None), fan_in=D)
    self.experts = Experts(model, partitioner, rngs)
    self.moe = model.moe
    self.partitioner = partitioner

  def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, Auxiliary]:
    moe, place = self.moe, self.partitioner.constrain
    # Groups are runs of tokens whatever the mesh is; O only says how many of them a data shard holds.
    O, D = self.partitioner.shards("outer"), x_BTD.shape[-1]
    x_OUMD = x_BTD.reshape(O, -1, moe.group_size, D)
    x_OUMD = place(x_OUMD, "outer", "groups", "group_tokens", "act_embed")
    valid_OUM = place(valid_BT.reshape(x_OUMD.shape[:3]), "outer", "groups", "group_tokens")
    with jax.named_scope("router"):  # float32: bfloat16 logits tie, and ties decide who is dropped
      logits_OUME = jnp.einsum("OUMD,DE->OUME", x_OUMD.astype(jnp.float32), self.w_router_DE[...])
      logits_OUME = place(logits_OUME, "outer", "groups", "group_tokens", None)
      routing = top_k_softmax(logits_OUME, valid_OUM, moe.experts_per_token, moe.renormalize, self.partitioner)
    out_OUMD, dropped = einsum_dispatch(x_OUMD, routing, self.experts, moe, self.partitioner)
    statistics = {**routing.statistics, "dropped_fraction": dropped}
    out_BTD = place(out_OUMD.reshape(x_BTD.shape), "batch", "sequence", "act_embed")
    return out_BTD, {"losses": routing.losses, "statistics": statistics}
