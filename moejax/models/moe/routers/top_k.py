"""Top-k: each token's best experts, within its best groups of experts.

O outer batch  U routing groups  M tokens  E experts  A experts per token  Z = groups of experts
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moejax.config.remat import ROUTER
from moejax.config.router import TopKRouter
from moejax.models.moe.routers.scores import log_scores, noisy, of_choices, on_own_tokens, scores, weighted
from moejax.models.moe.routing import RouterContext, Routing
from moejax.models.remat import keep


def top_k(router: TopKRouter, logits_OUME: jax.Array, context: RouterContext) -> Routing:
  """Routes each token to its A best experts (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961, with A = 1), within
  its best groups of experts if there are groups (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
  noisy_OUME = noisy(router, logits_OUME, context)
  order = [noisy_OUME]
  if context.bias_E is not None:
    biased_OUME = scores(noisy_OUME, router) + jax.lax.stop_gradient(context.bias_E).reshape(1, 1, 1, -1)
    order = [biased_OUME, noisy_OUME]

  def best(*order: jax.Array) -> jax.Array:
    if router.expert_groups > 1:
      allowed_OUME = _in_best_groups(order, router)
      order = tuple(jnp.where(allowed_OUME, x_OUME, -jnp.inf) for x_OUME in order)
    return _best(order, context.moe.experts_per_token)[-1]

  experts_OUMA = keep(on_own_tokens(best, context.partitioner, len(order))(*order), ROUTER)
  chosen_OUMA = jnp.broadcast_to(context.valid_OUM[..., None], experts_OUMA.shape)
  if router.skip_below:
    log_score_OUMA = jax.lax.stop_gradient(of_choices(log_scores(logits_OUME, router), experts_OUMA))
    chosen_OUMA &= log_score_OUMA >= log_score_OUMA[..., :1] + math.log(router.skip_below)
  return weighted(router, logits_OUME, experts_OUMA, chosen_OUMA)


def _best(order: Sequence[jax.Array], count: int) -> list[jax.Array]:
  """The values and, last, the indices of the largest along the last dimension, by the first array of `order`.

  A second array decides between equal values of the first: a score that is too small to change a bias in float32
  still ranks experts of equal bias.
  """
  if len(order) == 1:
    return list(jax.lax.top_k(order[0], count))
  first, second = order
  index = jax.lax.broadcasted_iota(jnp.int32, first.shape, first.ndim - 1)
  found = []
  for _ in range(count):
    best = first == jnp.max(first, axis=-1, keepdims=True)
    best &= second == jnp.max(second, axis=-1, keepdims=True, where=best, initial=-jnp.inf)
    at = jnp.min(index, axis=-1, keepdims=True, where=best, initial=first.shape[-1])
    found.append([jnp.max(x, axis=-1, keepdims=True, where=index == at, initial=-jnp.inf) for x in order] + [at])
    first = jnp.where(index == at, -jnp.inf, first)
  return [jnp.concatenate(values, axis=-1) for values in zip(*found, strict=True)]


def _in_best_groups(order: Sequence[jax.Array], router: TopKRouter) -> jax.Array:
  """Whether an expert is in one of the best groups of its token. The score of a group is the sum of the scores of its
  two best experts, including their biases if there are any."""
  *tokens, E = order[0].shape
  Z = router.expert_groups
  of_best_two = _best([x_OUME.reshape(*tokens, Z, E // Z) for x_OUME in order], min(2, E // Z))[:-1]
  *biased, logits = of_best_two
  worth = [jnp.sum(x, axis=-1) for x in biased] + [jax.nn.logsumexp(log_scores(logits, router), axis=-1)]
  best_groups = _best(worth, router.groups_per_token)[-1]
  is_best_OUMZ = jnp.any(best_groups[..., None, :] == jnp.arange(Z).reshape(1, 1, 1, -1, 1), axis=-1)
  return jnp.repeat(is_best_OUMZ, E // Z, axis=-1)
