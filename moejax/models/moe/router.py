"""Routers: from logits to choices, one function each.

O outer batch  U routing groups  M tokens in a group  E experts  A experts per token  C capacity  P groups of experts
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from moejax.config.moe import MoE
from moejax.config.router import Router
from moejax.errors import UserError
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
  keys_B: jax.Array | None = None,
) -> Routing:
  """The choices of every token.

  Args:
    logits_OUME: float32.
    valid_OUM: False for padding, which chooses nothing and is chosen by nothing.
    moe: the router and its limits.
    partitioner: says which tokens a device holds.
    bias_E: added to the scores that decide who is chosen, and not to the weights.
    keys_B: random keys of the sequences, for the noise in training; None has no noise.
  """
  if type(moe.router) is not Router:
    return _of_ones_own(moe.router)(logits_OUME, valid_OUM, moe, partitioner)
  noisy_OUME = logits_OUME
  if keys_B is not None and moe.router.gumbel:
    noisy_OUME = logits_OUME + moe.router.gumbel * _gumbel(keys_B, logits_OUME)
  noisy_OUME = jax.lax.stop_gradient(noisy_OUME)
  match moe.router.kind:
    case "top_k":
      return top_k(logits_OUME, noisy_OUME, valid_OUM, moe, partitioner, bias_E)
    case "top_p":
      return top_p(logits_OUME, noisy_OUME, valid_OUM, moe, partitioner)
    case "expert_choice":
      return expert_choice(logits_OUME, noisy_OUME, valid_OUM, moe, partitioner)
    case "dense":
      return every_expert(logits_OUME, valid_OUM, moe)

    case _:
      raise AssertionError(moe.router.kind)


Route = Callable[[jax.Array, jax.Array, MoE, Partitioner], Routing]
"""(logits_OUME, valid_OUM, moe, partitioner) to the choices, float32; called on the tokens of all devices."""

ROUTERS: dict[type[Router], Route] = {}
"""Routers of a user's own, by class of their configuration; a user's file adds to it. `route` has moejax's own."""


def _of_ones_own(router: Router) -> Route:
  found = ROUTERS.get(type(router))
  if found is None:
    name = type(router).__name__
    raise UserError(f"router {name} has no function; add one, as in moejax.models.moe.router.ROUTERS[{name}]")
  return found


def scores(logits_OUME: jax.Array, router: Router) -> jax.Array:
  """Softmax over the experts, or a sigmoid of each alone."""
  return jax.nn.softmax(logits_OUME, axis=-1) if router.scores == "softmax" else jax.nn.sigmoid(logits_OUME)


def probabilities(logits_OUME: jax.Array, router: Router) -> jax.Array:
  """The scores divided by their sum over the experts, for losses and statistics."""
  return jax.nn.softmax(_log_scores(logits_OUME, router), axis=-1)


def top_k(
  logits_OUME: jax.Array,
  noisy_OUME: jax.Array,
  valid_OUM: jax.Array,
  moe: MoE,
  partitioner: Partitioner,
  bias_E: jax.Array | None = None,
) -> Routing:
  """Each token's best A (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961, where A = 1), within its best groups of
  experts where there are groups (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
  order = [noisy_OUME]
  if bias_E is not None:
    biased_OUME = scores(noisy_OUME, moe.router) + jax.lax.stop_gradient(bias_E).reshape(1, 1, 1, -1)
    order = [biased_OUME, noisy_OUME]

  def best(*order: jax.Array) -> jax.Array:
    if moe.router.expert_groups > 1:
      allowed_OUME = _in_best_groups(order, moe.router)
      order = tuple(jnp.where(allowed_OUME, x_OUME, -jnp.inf) for x_OUME in order)
    return _best(order, moe.experts_per_token)[-1]

  experts_OUMA = keep(_on_own_tokens(best, partitioner, len(order))(*order))
  chosen_OUMA = jnp.broadcast_to(valid_OUM[..., None], experts_OUMA.shape)
  return _weighed(experts_OUMA, chosen_OUMA, logits_OUME, moe.router)


def top_p(
  logits_OUME: jax.Array, noisy_OUME: jax.Array, valid_OUM: jax.Array, moe: MoE, partitioner: Partitioner
) -> Routing:
  """Each token's best until their scores reach the threshold: at least one, at most A (XMoE, arXiv 2403.18926)."""

  def best(noisy_OUME: jax.Array) -> jax.Array:
    return jax.lax.top_k(noisy_OUME, moe.experts_per_token)[1]

  experts_OUMA = keep(_on_own_tokens(best, partitioner)(noisy_OUME))
  score_OUMA = jax.lax.stop_gradient(_of_choices(scores(logits_OUME, moe.router), experts_OUMA))
  before_OUMA = jnp.cumsum(score_OUMA, axis=-1) - score_OUMA
  first_A = jnp.arange(moe.experts_per_token).reshape(1, 1, 1, -1) == 0  # cumsum - x may round to above 0
  assert moe.router.threshold is not None
  chosen_OUMA = ((before_OUMA < moe.router.threshold) | first_A) & valid_OUM[..., None]
  return _weighed(experts_OUMA, chosen_OUMA, logits_OUME, moe.router)


def expert_choice(
  logits_OUME: jax.Array, noisy_OUME: jax.Array, valid_OUM: jax.Array, moe: MoE, partitioner: Partitioner
) -> Routing:
  """Each expert's best C tokens of a group (arXiv 2202.09368): all are loaded alike, and a token has 0 to E of them.

  Whether a token is chosen depends on the tokens after it: in a decoder that is a look at what it is to predict.
  """
  M = logits_OUME.shape[2]
  capacity = moe.capacity(M)

  def chosen(order_OUME: jax.Array) -> jax.Array:
    best_OUEC = jax.lax.top_k(order_OUME.swapaxes(2, 3), capacity)[1]
    return jnp.any(best_OUEC[:, :, None] == jnp.arange(M).reshape(1, 1, -1, 1, 1), axis=-1)

  # In the order of the scores, which may be too small for float32 or, of a sigmoid, round to 1.
  order_OUME = jax.nn.log_softmax(noisy_OUME) if moe.router.scores == "softmax" else noisy_OUME
  order_OUME = jnp.where(valid_OUM[..., None], order_OUME, -jnp.inf)
  whole_groups = ("outer", "groups", None, None)
  choose = partitioner.on_each_device(chosen, (whole_groups,), whole_groups)
  chosen_OUME = choose(order_OUME) & valid_OUM[..., None]
  return _of_all(chosen_OUME, scores(logits_OUME, moe.router), moe.router.scale)


def every_expert(logits_OUME: jax.Array, valid_OUM: jax.Array, moe: MoE) -> Routing:
  """All experts, weighed by their probabilities (DS-MoE, arXiv 2404.05567, equation 3)."""
  chosen_OUME = jnp.broadcast_to(valid_OUM[..., None], logits_OUME.shape)
  return _of_all(chosen_OUME, scores(logits_OUME, moe.router), moe.router.scale)


def _of_all(chosen_OUME: jax.Array, scores_OUME: jax.Array, scale: float) -> Routing:
  experts_OUME = jnp.broadcast_to(
    jnp.arange(scores_OUME.shape[-1], dtype=jnp.int32).reshape(1, 1, 1, -1), scores_OUME.shape
  )
  return Routing(experts_OUME, scale * scores_OUME * chosen_OUME, chosen_OUME, every_expert=True)


def _weighed(experts_OUMA: jax.Array, chosen_OUMA: jax.Array, logits_OUME: jax.Array, router: Router) -> Routing:
  if router.renormalize:
    # score / sum of scores, from their logarithms: the scores themselves may all be too small for float32. The first
    # choice stands for those of a padded token, whose weights are 0.
    log_score_OUMA = _of_choices(_log_scores(logits_OUME, router), experts_OUMA)
    counts_OUMA = chosen_OUMA | ~chosen_OUMA[..., :1]
    weights_OUMA = jax.nn.softmax(jnp.where(counts_OUMA, log_score_OUMA, -jnp.inf), axis=-1)
  else:
    weights_OUMA = _of_choices(scores(logits_OUME, router), experts_OUMA)
  return Routing(experts_OUMA, router.scale * weights_OUMA * chosen_OUMA, chosen_OUMA)


def _log_scores(logits_OUME: jax.Array, router: Router) -> jax.Array:
  """Logarithms of the scores, of a softmax up to what they have in common: finite wherever the logits are."""
  return logits_OUME if router.scores == "softmax" else jax.nn.log_sigmoid(logits_OUME)


def _of_choices(scores_OUME: jax.Array, experts_OUMA: jax.Array) -> jax.Array:
  """Each choice's score, by a comparison, whose gradient is no scatter."""
  is_expert_OUMAE = experts_OUMA[..., None] == jnp.arange(scores_OUME.shape[-1]).reshape(1, 1, 1, 1, -1)
  return jnp.sum(jnp.where(is_expert_OUMAE, scores_OUME[..., None, :], 0.0), axis=-1)


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


def _in_best_groups(order: Sequence[jax.Array], router: Router) -> jax.Array:
  """Whether an expert is in one of its token's best groups; a group is worth the sum of its best two experts' scores,
  with their biases where there are any."""
  *tokens, E = order[0].shape
  P = router.expert_groups
  of_best_two = _best([x_OUME.reshape(*tokens, P, E // P) for x_OUME in order], min(2, E // P))[:-1]
  *biased, logits = of_best_two
  worth = [jnp.sum(x, axis=-1) for x in biased] + [jax.nn.logsumexp(_log_scores(logits, router), axis=-1)]
  best_groups = _best(worth, router.groups_per_token)[-1]
  is_best_OUMP = jnp.any(best_groups[..., None, :] == jnp.arange(P).reshape(1, 1, 1, -1, 1), axis=-1)
  return jnp.repeat(is_best_OUMP, E // P, axis=-1)


def _gumbel(keys_B: jax.Array, logits_OUME: jax.Array) -> jax.Array:
  """Gumbel noise in the shape of the logits. It depends on the sequence and not on those computed with it."""
  E = logits_OUME.shape[-1]
  shape = (logits_OUME.size // (len(keys_B) * E), E)
  noise_BTE = jax.vmap(lambda key: jax.random.gumbel(key, shape, logits_OUME.dtype))(keys_B)
  return noise_BTE.reshape(logits_OUME.shape)


def _on_own_tokens(function: Callable, partitioner: Partitioner, arguments: int = 1) -> Callable:
  """On each device: the compiler does not divide a top-k and would gather the tokens of all devices for it."""
  return partitioner.on_each_device(function, (TOKENS,) * arguments, TOKENS)
