"""Auxiliary losses that balance the load of experts or bound the logits of the router.

E experts  L stacked layers
"""

import jax
import jax.numpy as jnp


def balance_loss(count_E: jax.Array, prob_E: jax.Array, tokens: jax.Array) -> jax.Array:
  """The load balancing loss of each set of tokens [...]: E x sum over experts of (share of choices) x (mean
  probability), which is 1 when balanced, E when one expert gets all, and 0 without tokens (GShard, arXiv 2006.16668,
  algorithm 1, over all A choices).

  Args:
    count_E: how often each expert is chosen, [..., E].
    prob_E: the sum of its probabilities, [..., E].
    tokens: real tokens, [...].
  """
  share_E = count_E / jnp.maximum(jnp.sum(count_E, axis=-1, keepdims=True), 1.0)
  prob_E = prob_E / jnp.maximum(tokens, 1)[..., None]
  return count_E.shape[-1] * jnp.sum(jax.lax.stop_gradient(share_E) * prob_E, axis=-1)


def mutual_information_loss(entropy_L: jax.Array, prob_LE: jax.Array) -> jax.Array:
  """Minus the mutual information of token and expert in nats [L]: H(e|x) - H(e) (DS-MoE, arXiv 2404.05567, equation 5).

  Args:
    entropy_L: mean entropy of a token's probabilities.
    prob_LE: mean probability of each expert.
  """
  return entropy_L - entropy(prob_LE)


def entropy(probs_E: jax.Array) -> jax.Array:
  """Entropy in nats of probabilities [..., E]; 0 log 0 is 0."""
  terms_E = jnp.where(probs_E > 0, probs_E * jnp.log(jnp.maximum(probs_E, 1e-30)), 0.0)
  return -jnp.sum(terms_E, axis=-1)
