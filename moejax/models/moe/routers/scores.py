"""Scores, order and weights from logits: what routers share.

O outer batch  U routing groups  M tokens  E experts  A experts per token  B batch
T query position
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.config.router import Router
from moejax.models.moe.routing import TOKENS, RouterContext, Routing
from moejax.partitioning import Partitioner


def scores(logits_OUME: jax.Array, router: Router) -> jax.Array:
  """The softmax over the experts, or the sigmoid of each logit."""
  return jax.nn.softmax(logits_OUME, axis=-1) if router.scores == "softmax" else jax.nn.sigmoid(logits_OUME)


def probabilities(logits_OUME: jax.Array, router: Router) -> jax.Array:
  """The scores divided by their sum over the experts, for losses and statistics."""
  return jax.nn.softmax(log_scores(logits_OUME, router), axis=-1)


def log_scores(logits_OUME: jax.Array, router: Router) -> jax.Array:
  """Logarithms of the scores, for a softmax up to a constant. They are finite wherever the logits are."""
  return logits_OUME if router.scores == "softmax" else jax.nn.log_sigmoid(logits_OUME)


def noisy(router: Router, logits_OUME: jax.Array, context: RouterContext) -> jax.Array:
  """The logits that experts are chosen by: with Gumbel noise in training, and without a gradient."""
  if context.keys_B is not None and router.gumbel:
    logits_OUME = logits_OUME + router.gumbel * _gumbel(context.keys_B, logits_OUME)
  return jax.lax.stop_gradient(logits_OUME)


def weighted(router: Router, logits_OUME: jax.Array, experts_OUMA: jax.Array, chosen_OUMA: jax.Array) -> Routing:
  """The routing with these choices and the weights that the router gives them."""
  if router.renormalize:
    # score / sum of scores, from their logarithms: the scores themselves may all be too small for float32. The first
    # choice stands for those of a padded token, whose weights are 0.
    log_score_OUMA = of_choices(log_scores(logits_OUME, router), experts_OUMA)
    counts_OUMA = chosen_OUMA | ~chosen_OUMA[..., :1]
    weights_OUMA = jax.nn.softmax(jnp.where(counts_OUMA, log_score_OUMA, -jnp.inf), axis=-1)
  else:
    weights_OUMA = of_choices(scores(logits_OUME, router), experts_OUMA)
  return Routing(experts_OUMA, router.scale * weights_OUMA * chosen_OUMA, chosen_OUMA)


def weighted_by_expert(router: Router, logits_OUME: jax.Array, chosen_OUME: jax.Array) -> Routing:
  """The routing that lists all experts. The weights of chosen experts are their scores."""
  scores_OUME = scores(logits_OUME, router)
  experts_OUME = jnp.broadcast_to(
    jnp.arange(scores_OUME.shape[-1], dtype=jnp.int32).reshape(1, 1, 1, -1), scores_OUME.shape
  )
  return Routing(experts_OUME, router.scale * scores_OUME * chosen_OUME, chosen_OUME, every_expert=True)


def of_choices(scores_OUME: jax.Array, experts_OUMA: jax.Array) -> jax.Array:
  """The score of each choice, by a comparison, so that the gradient needs no scatter."""
  is_expert_OUMAE = experts_OUMA[..., None] == jnp.arange(scores_OUME.shape[-1]).reshape(1, 1, 1, 1, -1)
  return jnp.sum(jnp.where(is_expert_OUMAE, scores_OUME[..., None, :], 0.0), axis=-1)


def on_own_tokens(function: Callable, partitioner: Partitioner, arguments: int = 1) -> Callable:
  """Runs a function on each device, since the compiler does not partition top-k and would gather all tokens for it."""
  return partitioner.on_each_device(function, (TOKENS,) * arguments, TOKENS)


def _gumbel(keys_B: jax.Array, logits_OUME: jax.Array) -> jax.Array:
  """Gumbel noise in the shape of the logits. It depends on the key of the sequence alone, not on its batch."""
  E = logits_OUME.shape[-1]
  shape = (logits_OUME.size // (len(keys_B) * E), E)
  noise_BTE = jax.vmap(lambda key: jax.random.gumbel(key, shape, logits_OUME.dtype))(keys_B)
  return noise_BTE.reshape(logits_OUME.shape)
