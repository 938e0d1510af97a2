"""What routing costs and how evenly it loads: auxiliary losses, statistics, and the bias that balances without a loss.

O outer batch  U routing groups  M tokens in a group  B batch  T position  E experts  L sparse layers
X any number of sets of tokens
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moejax.models.moe.routing import Routing

Auxiliary = dict[str, dict[str, jax.Array]]
"""`losses` and `statistics` of a layer, by name."""

BIAS = "bias_E"
"""Name of a router's bias among its layer's parameters."""


def losses(
  logits_OUME: jax.Array, probs_OUME: jax.Array, routing: Routing, valid_BT: jax.Array, names: Sequence[str]
) -> dict[str, jax.Array]:
  """The auxiliary losses of a sparse layer by name, float32 scalars; padded tokens count in none.

  Args:
    logits_OUME: float32.
    probs_OUME: scores that sum to 1.
    routing: the choices; they count before any are dropped.
    valid_BT: False for padding; the same tokens as [O, U, M], in the same order.
    names: which losses, as `MoE.losses` has them.
  """
  valid_OUM = valid_BT.reshape(probs_OUME.shape[:3])
  chosen_OUME = routing.chosen_OUME(probs_OUME.shape[-1])
  real_OUME = probs_OUME * valid_OUM[..., None]

  def balance(tokens: tuple[int, ...]) -> jax.Array:
    """The loss over sets of tokens: `tokens` is the shape to which [O, U, M] is brought, whose last axis is a set."""
    count, prob = (jnp.sum(x.reshape(*tokens, -1), axis=-2) for x in (chosen_OUME, real_OUME))
    return balance_loss(count, prob, jnp.sum(valid_OUM.reshape(tokens), axis=-1))

  found = {
    "load_balance": lambda: balance(valid_OUM.shape),
    "sequence_balance": lambda: balance(valid_BT.shape),
    "global_balance": lambda: balance((valid_OUM.size,)),
    "router_z": lambda: router_z_loss(logits_OUME, valid_OUM),
    "mutual_information": lambda: mutual_information_loss(probs_OUME, valid_OUM),
  }
  return {name: found[name]() for name in names}


def balance_loss(count_XE: jax.Array, prob_XE: jax.Array, tokens_X: jax.Array) -> jax.Array:
  """E x sum over experts of (share of choices) x (mean probability) of each set of tokens, averaged over those that
  have any: 1 when balanced, E when one expert gets all (GShard, arXiv 2006.16668, algorithm 1; all A choices count).

  Args:
    count_XE: choices of each expert.
    prob_XE: sum of its probabilities.
    tokens_X: real tokens.
  """
  share_XE = count_XE / jnp.maximum(jnp.sum(count_XE, axis=-1, keepdims=True), 1.0)
  prob_XE = prob_XE / jnp.maximum(tokens_X, 1)[..., None]
  loss_X = count_XE.shape[-1] * jnp.sum(jax.lax.stop_gradient(share_XE) * prob_XE, axis=-1)
  return jnp.sum(loss_X) / jnp.maximum(jnp.sum(tokens_X > 0), 1)


def router_z_loss(logits_OUME: jax.Array, valid_OUM: jax.Array) -> jax.Array:
  """Mean squared log-normaliser over real tokens (ST-MoE, arXiv 2202.08906, equation 5)."""
  return _mean(jnp.square(jax.nn.logsumexp(logits_OUME, axis=-1)), valid_OUM)


def mutual_information_loss(probs_OUME: jax.Array, valid_OUM: jax.Array) -> jax.Array:
  """-H(e) + mean of H(e|x), in nats: minus what a token tells of its expert (DS-MoE, arXiv 2404.05567, equation 5)."""
  total_E = jnp.sum(probs_OUME * valid_OUM[..., None], axis=(0, 1, 2))
  return entropy(probs_OUME, valid_OUM) - _entropy(total_E / jnp.maximum(jnp.sum(valid_OUM), 1))


def statistics(probs_OUME: jax.Array, routing: Routing, valid_BT: jax.Array) -> dict[str, jax.Array]:
  """`load` [E], each expert's share of the choices before any are dropped, `entropy` of a token's probabilities in
  nats, and `choices_per_token`."""
  valid_OUM = valid_BT.reshape(probs_OUME.shape[:3])
  count_E = jnp.sum(routing.chosen_OUME(probs_OUME.shape[-1]), axis=(0, 1, 2))
  choices = jnp.sum(count_E)
  return {
    "load": count_E / jnp.maximum(choices, 1.0),
    "entropy": entropy(probs_OUME, valid_OUM),
    "choices_per_token": choices / jnp.maximum(jnp.sum(valid_OUM), 1),
  }


def entropy(probs_OUME: jax.Array, valid_OUM: jax.Array) -> jax.Array:
  """Mean entropy of a real token's probabilities in nats; log E when the router does not care."""
  return _mean(_entropy(probs_OUME), valid_OUM)


def update_bias(parameters: Mapping[str, Any], load_LE: jax.Array, rate: float) -> dict[str, Any]:
  """The parameters with every router's bias moved: up by `rate` for experts below the mean load, down for those above
  (arXiv 2408.15664, algorithm 1).

  Args:
    parameters: of the whole model.
    load_LE: each expert's share of the step's choices, in the order of the sparse layers.
    rate: size of the move.
  """
  violation_LE = jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE
  layer = 0

  def moved(path: tuple, leaf: jax.Array) -> jax.Array:
    nonlocal layer
    if path[-1].key != BIAS:
      return leaf
    layers = leaf.size // load_LE.shape[-1]  # all of them where they are stacked, else one after the other
    here = violation_LE[layer : layer + layers].reshape(leaf.shape)
    layer += layers
    return leaf + rate * jnp.sign(here)

  return jax.tree_util.tree_map_with_path(moved, parameters)


def _entropy(probs_XE: jax.Array) -> jax.Array:
  terms_XE = jnp.where(probs_XE > 0, probs_XE * jnp.log(jnp.maximum(probs_XE, 1e-30)), 0.0)
  return -jnp.sum(terms_XE, axis=-1)


def _mean(x_OUM: jax.Array, valid_OUM: jax.Array) -> jax.Array:
  return jnp.sum(x_OUM * valid_OUM) / jnp.maximum(jnp.sum(valid_OUM), 1)
