"""Threshold: each token's experts whose probability is above a limit.

O outer batch  U routing groups  M tokens  E experts
"""

import jax
import jax.numpy as jnp

from moejax.config.router import ThresholdRouter
from moejax.models.moe.routers.scores import on_own_tokens, scores, weighted_by_expert
from moejax.models.moe.routing import RouterContext, Routing


def threshold(router: ThresholdRouter, logits_OUME: jax.Array, context: RouterContext) -> Routing:
  """Routes each token to the experts whose probability is above threshold / E, or to as many of its best experts as
  tokens have such experts in the mean, rounded (DS-MoE, arXiv 2404.05567, section 3.5)."""
  held_OUME = jax.lax.stop_gradient(logits_OUME)
  rank_OUME = on_own_tokens(_ranks, context.partitioner)(held_OUME)
  valid_OUM1 = context.valid_OUM[..., None]
  above_OUME = scores(held_OUME, router) * logits_OUME.shape[-1] > router.threshold
  chosen_OUME = (above_OUME | (rank_OUME == 0)) & valid_OUM1
  if router.equal_counts:
    tokens = jnp.maximum(jnp.sum(valid_OUM1, dtype=jnp.float32), 1.0)
    mean = jnp.sum(chosen_OUME, dtype=jnp.float32) / tokens
    chosen_OUME = (rank_OUME < jnp.round(mean).astype(jnp.int32)) & valid_OUM1
  return weighted_by_expert(router, logits_OUME, chosen_OUME)


def _ranks(logits_OUME: jax.Array) -> jax.Array:
  """The position of each expert in the order of its token, from 0 for the best. Of equal ones the first is better."""
  order_OUME = jnp.argsort(-logits_OUME, axis=-1, stable=True)
  return jnp.argsort(order_OUME, axis=-1).astype(jnp.int32)
