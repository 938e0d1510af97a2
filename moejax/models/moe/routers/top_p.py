"""Top-p: each token's best experts until their probabilities reach a threshold.

O outer batch  U routing groups  M tokens  E experts  A experts per token
"""

import jax
import jax.numpy as jnp

from moejax.config.remat import ROUTER
from moejax.config.router import TopPRouter
from moejax.models.moe.routers.scores import noisy, of_choices, on_own_tokens, scores, weighted
from moejax.models.moe.routing import RouterContext, Routing
from moejax.models.remat import keep


def top_p(router: TopPRouter, logits_OUME: jax.Array, context: RouterContext) -> Routing:
  """Routes each token to its best experts until their scores reach the threshold: at least 1 and at most A experts
  (XMoE, arXiv 2403.18926)."""

  def best(noisy_OUME: jax.Array) -> jax.Array:
    return jax.lax.top_k(noisy_OUME, context.moe.experts_per_token)[1]

  experts_OUMA = keep(on_own_tokens(best, context.partitioner)(noisy(router, logits_OUME, context)), ROUTER)
  score_OUMA = jax.lax.stop_gradient(of_choices(scores(logits_OUME, router), experts_OUMA))
  before_OUMA = jnp.cumsum(score_OUMA, axis=-1) - score_OUMA
  first_A = jnp.arange(context.moe.experts_per_token).reshape(1, 1, 1, -1) == 0  # cumsum - x may round to above 0
  chosen_OUMA = ((before_OUMA < router.threshold) | first_A) & context.valid_OUM[..., None]
  return weighted(router, logits_OUME, experts_OUMA, chosen_OUMA)
