"""Routers: from logits to choices, one function each.

O outer batch  U routing groups  M tokens in a group  E experts  A experts per token  C capacity  P groups of experts
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.config.moe import MoE
from moejax.config.router import Router
from moejax.models.layers import keep
from moejax.models.moe.routing import Routing
from moejax.partitioning import Partitioner

TOKENS = ("outer", "groups", "group_tokens", None)
"""Names of [O, U, M, anything]: a device routes its own tokens."""


def route(
  logits_OUME: jax.Array,
  valid_OUM: jax.Array,
  moe: MoE,
  partitioner: Partitioner,
  bias_E: jax.Array | None = None,
  key: jax.Array | None = None,
) -> Routing:
  """The choices of every token.

  Args:
    logits_OUME: float32.
    valid_OUM: False for padding, which chooses nothing and is chosen by nothing.
    moe: the router and its limits.
    partitioner: says which tokens a device holds.
    bias_E: added to the scores that decide who is chosen, and not to the weights.
    key: of the noise in training; None has no noise.
  """
  scores_OUME = scores(logits_OUME, moe.router)
  noisy = key is not None and moe.router.gumbel > 0
  ranked_OUME = scores(_with_gumbel(logits_OUME, moe.router.gumbel, key), moe.router) if noisy else scores_OUME
  if bias_E is not None:
    ranked_OUME = ranked_OUME + bias_E.reshape(1, 1, 1, -1)
  ranked_OUME = jax.lax.stop_gradient(ranked_OUME)
  match moe.router.kind:
    case "top_k":
      return top_k(scores_OUME, ranked_OUME, valid_OUM, moe, partitioner)
    case "top_p":
      return top_p(scores_OUME, ranked_OUME, valid_OUM, moe, partitioner)
    case "expert_choice":
      return expert_choice(scores_OUME, ranked_OUME, valid_OUM, moe, partitioner)
    case "dense":
      return every_expert(scores_OUME, valid_OUM, moe)


def scores(logits_OUME: jax.Array, router: Router) -> jax.Array:
  """Softmax over the experts, or a sigmoid of each alone."""
  return jax.nn.softmax(logits_OUME, axis=-1) if router.scores == "softmax" else jax.nn.sigmoid(logits_OUME)


def top_k(
  scores_OUME: jax.Array, ranked_OUME: jax.Array, valid_OUM: jax.Array, moe: MoE, partitioner: Partitioner
) -> Routing:
  """Each token's best A (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961, where A = 1), within its best groups of
  experts where there are groups (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

  def best(ranked_OUME: jax.Array) -> jax.Array:
    return jax.lax.top_k(_within_best_groups(ranked_OUME, moe.router), moe.experts_per_token)[1]

  experts_OUMA = keep(_on_own_tokens(best, partitioner)(ranked_OUME))
  chosen_OUMA = jnp.broadcast_to(valid_OUM[..., None], experts_OUMA.shape)
  return _weighed(experts_OUMA, chosen_OUMA, scores_OUME, moe.router)


def top_p(
  scores_OUME: jax.Array, ranked_OUME: jax.Array, valid_OUM: jax.Array, moe: MoE, partitioner: Partitioner
) -> Routing:
  """Each token's best until their scores reach the threshold: at least one, at most A (XMoE, arXiv 2403.18926)."""

  def best(ranked_OUME: jax.Array) -> jax.Array:
    return jax.lax.top_k(ranked_OUME, moe.experts_per_token)[1]

  experts_OUMA = keep(_on_own_tokens(best, partitioner)(ranked_OUME))
  score_OUMA = jax.lax.stop_gradient(_of_choices(scores_OUME, experts_OUMA))
  before_OUMA = jnp.cumsum(score_OUMA, axis=-1) - score_OUMA
  first_A = jnp.arange(moe.experts_per_token).reshape(1, 1, 1, -1) == 0  # cumsum - x may round to above 0
  assert moe.router.threshold is not None
  chosen_OUMA = ((before_OUMA < moe.router.threshold) | first_A) & valid_OUM[..., None]
  return _weighed(experts_OUMA, chosen_OUMA, scores_OUME, moe.router)


def expert_choice(
  scores_OUME: jax.Array, ranked_OUME: jax.Array, valid_OUM: jax.Array, moe: MoE, partitioner: Partitioner
) -> Routing:
  """Each expert's best C tokens of a group (arXiv 2202.09368): all are loaded alike, and a token has 0 to E of them.

  Whether a token is chosen depends on the tokens after it: in a decoder that is a look at what it is to predict.
  """
  M = scores_OUME.shape[2]
  capacity = moe.capacity(M)

  def chosen(ranked_OUME: jax.Array) -> jax.Array:
    best_OUEC = jax.lax.top_k(ranked_OUME.swapaxes(2, 3), capacity)[1]
    return jnp.any(best_OUEC[:, :, None] == jnp.arange(M).reshape(1, 1, -1, 1, 1), axis=-1)

  ranked_OUME = jnp.where(valid_OUM[..., None], ranked_OUME, -jnp.inf)
  chosen_OUME = _on_own_tokens(chosen, partitioner)(ranked_OUME) & valid_OUM[..., None]
  return _of_all(chosen_OUME, scores_OUME, moe.router.scale)


def every_expert(scores_OUME: jax.Array, valid_OUM: jax.Array, moe: MoE) -> Routing:
  """All experts, weighed by their probabilities (DS-MoE, arXiv 2404.05567, equation 3)."""
  return _of_all(jnp.broadcast_to(valid_OUM[..., None], scores_OUME.shape), scores_OUME, moe.router.scale)


def _of_all(chosen_OUME: jax.Array, scores_OUME: jax.Array, scale: float) -> Routing:
  experts_OUME = jnp.broadcast_to(
    jnp.arange(scores_OUME.shape[-1], dtype=jnp.int32).reshape(1, 1, 1, -1), scores_OUME.shape
  )
  return Routing(experts_OUME, scale * scores_OUME * chosen_OUME, chosen_OUME, every_expert=True)


def _weighed(experts_OUMA: jax.Array, chosen_OUMA: jax.Array, scores_OUME: jax.Array, router: Router) -> Routing:
  weights_OUMA = _of_choices(scores_OUME, experts_OUMA) * chosen_OUMA
  if router.renormalize:
    total_OUM1 = jnp.sum(weights_OUMA, axis=-1, keepdims=True)
    weights_OUMA = weights_OUMA / jnp.where(total_OUM1 > 0, total_OUM1, 1.0)
  return Routing(experts_OUMA, router.scale * weights_OUMA, chosen_OUMA)


def _of_choices(scores_OUME: jax.Array, experts_OUMA: jax.Array) -> jax.Array:
  """Each choice's score, by a comparison, whose gradient is no scatter."""
  is_expert_OUMAE = experts_OUMA[..., None] == jnp.arange(scores_OUME.shape[-1]).reshape(1, 1, 1, 1, -1)
  return jnp.sum(jnp.where(is_expert_OUMAE, scores_OUME[..., None, :], 0.0), axis=-1)


def _within_best_groups(ranked_OUME: jax.Array, router: Router) -> jax.Array:
  """The same with -inf for experts outside a token's best groups; a group is as good as its best two experts."""
  if router.expert_groups == 1:
    return ranked_OUME
  *tokens, E = ranked_OUME.shape
  ranked_OUMPE = ranked_OUME.reshape(*tokens, router.expert_groups, -1)
  best_two = jax.lax.top_k(ranked_OUMPE, min(2, ranked_OUMPE.shape[-1]))[0]
  best_groups = jax.lax.top_k(jnp.sum(best_two, axis=-1), router.groups_per_token)[1]
  groups_P = jnp.arange(router.expert_groups).reshape(1, 1, 1, -1, 1)
  is_best_OUMP = jnp.any(best_groups[..., None, :] == groups_P, axis=-1)
  return jnp.where(is_best_OUMP[..., None], ranked_OUMPE, -jnp.inf).reshape(*tokens, E)


def _with_gumbel(logits_OUME: jax.Array, amount: float, key: jax.Array | None) -> jax.Array:
  assert key is not None
  return logits_OUME + amount * jax.random.gumbel(key, logits_OUME.shape, logits_OUME.dtype)


def _on_own_tokens(function: Callable, partitioner: Partitioner) -> Callable:
  """On each device: the compiler does not divide a top-k and would gather the tokens of all devices for it."""
  return partitioner.on_each_device(function, (TOKENS,), TOKENS)
