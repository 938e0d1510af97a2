"""Which experts a token goes to, with what weight, and what the routing costs.

O outer batch  U routing groups  M tokens in a group  D embed  E experts  A experts per token
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.partitioning import Partitioner


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """The router's decision for every token; padded tokens are chosen for no expert and weigh nothing."""

  experts_OUMA: jax.Array
  """Chosen experts, best first, int32."""
  weights_OUMA: jax.Array
  """Weight of each choice in the token's output, float32."""
  valid_OUM: jax.Array
  """Whether the token is real, bool."""
  losses: dict[str, jax.Array]
  """Auxiliary losses by name, float32 scalars."""
  statistics: dict[str, jax.Array]
  """`load` [E], each expert's share of the choices before any are dropped, and `entropy` of the probabilities, nats."""


def top_k_softmax(
  logits_OUME: jax.Array, valid_OUM: jax.Array, experts_per_token: int, renormalize: bool, partitioner: Partitioner
) -> Routing:
  """Softmax over all experts, then the best A (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961, where A = 1).

  Args:
    logits_OUME: float32.
    valid_OUM: False for padding.
    experts_per_token: A.
    renormalize: whether the chosen weights are scaled to sum to 1; else they stay probabilities.
    partitioner: says which tokens a device holds.
  """
  probs_OUME = jax.nn.softmax(logits_OUME, axis=-1)
  names = ("outer", "groups", "group_tokens", None)
  # On each device: the compiler does not divide a top-k and would gather the tokens of all devices for it.
  best = partitioner.on_each_device(
    lambda probs: tuple(jax.lax.top_k(probs, experts_per_token)), (names,), (names, names)
  )
  weights_OUMA, experts_OUMA = best(probs_OUME)
  if renormalize:
    weights_OUMA = weights_OUMA / jnp.sum(weights_OUMA, axis=-1, keepdims=True)
  E = logits_OUME.shape[-1]
  chosen_OUME = jnp.sum(jax.nn.one_hot(experts_OUMA, E, dtype=jnp.float32), axis=-2)
  chosen_OUME = chosen_OUME * valid_OUM[..., None]
  return Routing(
    experts_OUMA=experts_OUMA,
    weights_OUMA=weights_OUMA * valid_OUM[..., None],
    valid_OUM=valid_OUM,
    losses={
      "load_balance": load_balance_loss(probs_OUME, chosen_OUME, valid_OUM),
      "router_z": router_z_loss(logits_OUME, valid_OUM),
    },
    statistics={"load": load(chosen_OUME), "entropy": entropy(probs_OUME, valid_OUM)},
  )


def load_balance_loss(probs_OUME: jax.Array, chosen_OUME: jax.Array, valid_OUM: jax.Array) -> jax.Array:
  """E x sum over experts of (share of choices) x (mean probability), per group, averaged over groups that have tokens.

  1 when balanced (GShard, arXiv 2006.16668, algorithm 1; all A choices count). Choices count before any are dropped.
  """
  E = probs_OUME.shape[-1]
  tokens_OU1 = jnp.sum(valid_OUM, axis=-1, dtype=jnp.float32)[..., None]
  share_OUE = jnp.sum(chosen_OUME, axis=-2)
  share_OUE = share_OUE / jnp.maximum(jnp.sum(share_OUE, axis=-1, keepdims=True), 1.0)
  prob_OUE = jnp.sum(probs_OUME * valid_OUM[..., None], axis=-2) / jnp.maximum(tokens_OU1, 1.0)
  loss_OU = E * jnp.sum(jax.lax.stop_gradient(share_OUE) * prob_OUE, axis=-1)
  return jnp.sum(loss_OU) / jnp.maximum(jnp.sum(tokens_OU1 > 0), 1)


def router_z_loss(logits_OUME: jax.Array, valid_OUM: jax.Array) -> jax.Array:
  """Mean squared log-normaliser over real tokens (ST-MoE, arXiv 2202.08906, equation 5)."""
  return _mean(jnp.square(jax.nn.logsumexp(logits_OUME, axis=-1)), valid_OUM)


def load(chosen_OUME: jax.Array) -> jax.Array:
  """load_E: each expert's share of all choices."""
  counts_E = jnp.sum(chosen_OUME, axis=(0, 1, 2))
  return counts_E / jnp.maximum(jnp.sum(counts_E), 1.0)


def entropy(probs_OUME: jax.Array, valid_OUM: jax.Array) -> jax.Array:
  """Mean entropy of a token's probabilities in nats; log E when the router does not care."""
  terms_OUME = jnp.where(probs_OUME > 0, probs_OUME * jnp.log(jnp.maximum(probs_OUME, 1e-30)), 0.0)
  return _mean(-jnp.sum(terms_OUME, axis=-1), valid_OUM)


def _mean(x_OUM: jax.Array, valid_OUM: jax.Array) -> jax.Array:
  return jnp.sum(x_OUM * valid_OUM) / jnp.maximum(jnp.sum(valid_OUM), 1)
