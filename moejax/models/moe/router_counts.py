"""Sums over a batch, from which auxiliary losses and router metrics are computed.

A layer counts only within sets of its own device's tokens (`count_probabilities`, `count_choices`). The sums over all
sets (`sum_counts`) follow for all layers at once: computed in the layer, each would be a sum over all devices for which
the next layer waits. The sums of the parts of a batch add up to those of the batch, whatever padding each part has.

B batch  T query position  O outer batch  U routing groups  M tokens  E experts  L stacked layers
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.models.moe.losses import balance_loss, entropy
from moejax.models.moe.routing import Routing

RouterCounts = dict[str, jax.Array]
"""Sums over sets of tokens, float32, where an outer batch has `sets` of them: `tokens` [O, sets], `probs`
[O, sets, E] and `entropy` [O, sets] in nats. A router over experts also has `choices` [O, sets, E],
`squared_normalizer` [O, sets] and `dropped` [O, U]. Padding is not counted."""

RouterSums = dict[str, jax.Array]
"""RouterCounts summed over sets, with a leading dimension of layers: `probs` [L, E] and `entropy` [L]. A router over
experts also has `choices` [L, E] and `dropped` [L] in int32, `squared_normalizer` [L], and the balance loss of each
group or sequence, summed: `load_balance` [L] over groups and `sequence_balance` [L] over sequences."""

EXPERTS, CHOSEN, HEADS, DEPTHS = "experts", "experts_of_chosen", "heads", "depths"
"""Kinds of routers in a layer, by what they choose: experts, for all tokens or for those alone that a mixture of depths
chose; heads; or the tokens that go through the layer. The counts of the last kind are those of
`moejax.models.depths.count_depths`."""


class TokenCounts(NamedTuple):
  """Denominators of the losses and metrics of a whole batch, float32, at least 1."""

  tokens: jax.Array
  """Real tokens."""
  groups: jax.Array
  """Routing groups that have any."""
  sequences: jax.Array
  """Sequences that have any."""


def token_counts(valid_BT: jax.Array, group_tokens: int) -> TokenCounts:
  """The counts of a whole batch.

  Args:
    valid_BT: False for padding.
    group_tokens: M.
  """
  of_groups, of_sequences = (jnp.any(x, axis=-1) for x in (valid_BT.reshape(-1, group_tokens), valid_BT))
  return TokenCounts(*(jnp.maximum(jnp.sum(x, dtype=jnp.float32), 1.0) for x in (valid_BT, of_groups, of_sequences)))


def count_probabilities(probs_OUME: jax.Array, valid_OUM: jax.Array, sequence_length: int) -> RouterCounts:
  """Computes the sums of every router, in sets of which groups and sequences consist.

  Args:
    probs_OUME: scores that sum to 1.
    valid_OUM: False for padding.
    sequence_length: T.
  """
  in_set = _sets(valid_OUM.shape, sequence_length)
  return {
    "tokens": in_set(valid_OUM),
    "probs": in_set(probs_OUME * valid_OUM[..., None]),
    "entropy": in_set(entropy(probs_OUME) * valid_OUM),
  }


def count_choices(
  logits_OUME: jax.Array, routing: Routing, valid_OUM: jax.Array, dropped_OU: jax.Array, sequence_length: int
) -> RouterCounts:
  """Computes the additional sums of a router over experts. Choices are counted before any are dropped.

  Args:
    logits_OUME: float32.
    routing: the choices.
    valid_OUM: False for padding.
    dropped_OU: choices that the dispatch dropped.
    sequence_length: T.
  """
  in_set = _sets(valid_OUM.shape, sequence_length)
  return {
    "choices": in_set(routing.chosen_OUME(logits_OUME.shape[-1])),
    "squared_normalizer": in_set(jnp.square(jax.nn.logsumexp(logits_OUME, axis=-1)) * valid_OUM),
    "dropped": dropped_OU.astype(jnp.float32),
  }


def sum_depths(of_layers: RouterCounts) -> RouterSums:
  """Sums the counts [L, B] of routers over tokens over all sequences, numbers of tokens in int32."""
  of_tokens = {name: jnp.sum(of_layers[name].astype(jnp.int32), axis=1) for name in ("through", "dropped")}
  return of_tokens | {"loss": jnp.sum(of_layers["loss"], axis=1)}


def sum_counts(of_layers: RouterCounts, group_tokens: int, sequence_length: int) -> RouterSums:
  """Sums over all sets of the batch.

  Args:
    of_layers: the counts of one kind of router, with a leading dimension of layers.
    group_tokens: M.
    sequence_length: T.
  """
  sums = {name: jnp.sum(of_layers[name], axis=(1, 2)) for name in ("probs", "entropy")}
  if "choices" not in of_layers:
    return sums
  # In int32, since float32 cannot count above 2^24.
  sums |= {name: jnp.sum(of_layers[name].astype(jnp.int32), axis=(1, 2)) for name in ("choices", "dropped")}
  sums["squared_normalizer"] = jnp.sum(of_layers["squared_normalizer"], axis=(1, 2))
  unit = math.gcd(group_tokens, sequence_length)
  for name, tokens in (("load_balance", group_tokens), ("sequence_balance", sequence_length)):

    def balance(of_layer: RouterCounts, sets: int = tokens // unit) -> jax.Array:
      return jnp.sum(balance_loss(*(_joined(of_layer[name], sets) for name in ("choices", "probs", "tokens"))))

    sums[name] = jax.vmap(balance)(of_layers)
  return sums


def _sets(tokens: tuple[int, ...], sequence_length: int) -> Callable[[jax.Array], jax.Array]:
  """Returns the function that sums [O, U, M, ...] to [O, sets, ...]. A set lies in one group and in one sequence."""
  O, U, M = tokens
  unit = math.gcd(M, sequence_length)

  def in_set(x: jax.Array) -> jax.Array:
    return jnp.sum(x.astype(jnp.float32).reshape(O, U * M // unit, unit, *x.shape[3:]), axis=2)

  return in_set


def _joined(x: jax.Array, sets: int) -> jax.Array:
  """Sums every `sets` consecutive sets of [O, sets, ...]: a flat list of groups or sequences."""
  x = x.reshape(-1, *x.shape[2:])
  return jnp.sum(x.reshape(-1, sets, *x.shape[1:]), axis=1)
