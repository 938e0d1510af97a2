"""Expert choice: each expert's best tokens.

O outer batch  U routing groups  M tokens  E experts  C capacity
"""

import jax
import jax.numpy as jnp

from moejax.config.router import ExpertChoiceRouter
from moejax.models.moe.routers.scores import noisy, weighted_by_expert
from moejax.models.moe.routing import RouterContext, Routing


def expert_choice(router: ExpertChoiceRouter, logits_OUME: jax.Array, context: RouterContext) -> Routing:
  """Each expert chooses its C best tokens of a group (arXiv 2202.09368). All experts have equal loads, and a token is
  chosen by 0 to E experts.

  Whether a token is chosen depends on later tokens, so that a decoder with this router is not causal.
  """
  M = logits_OUME.shape[2]
  capacity = context.moe.capacity(M)
  noisy_OUME = noisy(router, logits_OUME, context)

  def chosen(order_OUME: jax.Array) -> jax.Array:
    best_OUEC = jax.lax.top_k(order_OUME.swapaxes(2, 3), capacity)[1]
    return jnp.any(best_OUEC[:, :, None] == jnp.arange(M).reshape(1, 1, -1, 1, 1), axis=-1)

  # In the order of the scores, which may be too small for float32 or, of a sigmoid, round to 1.
  order_OUME = jax.nn.log_softmax(noisy_OUME) if router.scores == "softmax" else noisy_OUME
  order_OUME = jnp.where(context.valid_OUM[..., None], order_OUME, -jnp.inf)
  whole_groups = ("outer", "groups", None, None)
  choose = context.partitioner.on_each_device(chosen, (whole_groups,), whole_groups)
  chosen_OUME = choose(order_OUME) & context.valid_OUM[..., None]
  return weighted_by_expert(router, logits_OUME, chosen_OUME)
