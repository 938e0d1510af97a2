"""Dense routing: every expert for every token.

O outer batch  U routing groups  M tokens  E experts
"""

import jax
import jax.numpy as jnp

from moejax.config.router import DenseRouter
from moejax.models.moe.routers.scores import weighted_by_expert
from moejax.models.moe.routing import RouterContext, Routing


def dense(router: DenseRouter, logits_OUME: jax.Array, context: RouterContext) -> Routing:
  """Routes each token to all experts, weighted by their probabilities (DS-MoE, arXiv 2404.05567, equation 3)."""
  return weighted_by_expert(router, logits_OUME, jnp.broadcast_to(context.valid_OUM[..., None], logits_OUME.shape))
