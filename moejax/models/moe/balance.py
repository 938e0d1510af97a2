"""What routing costs and how evenly it loads: auxiliary losses, statistics, and the bias that balances without a loss.

A layer only counts, within sets of its own device's tokens (`tally`); losses and statistics follow from the counts of
all layers at once. Computed in the layer, each would be a sum over all devices that the next layer waits for.

O outer batch  U routing groups  M tokens in a group  B batch  T position  S sets of N tokens in an outer batch
E experts  L layers that have the router  X any number of sets
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config.model import Model
from moejax.models.moe.routing import Routing

Auxiliary = dict[str, dict[str, jax.Array]]
"""`losses` and `statistics` by name, with a leading dimension of the layers that have them."""

Tally = dict[str, jax.Array]
"""Sums over sets of tokens, float32: `tokens` [O, S], `probs` [O, S, E], `entropy` [O, S] in nats; of a router over
experts also `choices` [O, S, E], `squared_normalizer` [O, S] and `dropped` [O, U]. Padding counts in none."""

EXPERTS, HEADS = "experts", "heads"
"""Routers of a layer, by what they choose."""

BIAS = "bias_E"
"""Name of a router's bias among its layer's parameters."""


def tally(probs_OUME: jax.Array, valid_OUM: jax.Array, sequence_length: int) -> Tally:
  """What every router counts, in sets that both a group and a sequence consist of.

  Args:
    probs_OUME: scores that sum to 1.
    valid_OUM: False for padding.
    sequence_length: T.
  """
  in_set = _sets(valid_OUM.shape, sequence_length)
  return {
    "tokens": in_set(valid_OUM),
    "probs": in_set(probs_OUME * valid_OUM[..., None]),
    "entropy": in_set(_entropy(probs_OUME) * valid_OUM),
  }


def tally_choices(
  logits_OUME: jax.Array, routing: Routing, valid_OUM: jax.Array, dropped_OU: jax.Array, sequence_length: int
) -> Tally:
  """What a router over experts counts besides; choices count before any are dropped.

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


def summarise(tallies: Mapping[str, Tally], model: Model, sequence_length: int) -> Auxiliary:
  """The losses and statistics of all layers.

  Args:
    tallies: of each kind of router, with a leading dimension of layers.
    model: says which losses there are.
    sequence_length: T.
  """
  found: Auxiliary = {"losses": {}, "statistics": {}}
  if HEADS in tallies:
    of_heads = tallies[HEADS]
    found["losses"]["attention_mutual_information"] = jax.vmap(mutual_information_loss)(of_heads)
    found["statistics"]["attention_entropy"] = _per_token(of_heads, "entropy")
  if EXPERTS in tallies:
    assert model.moe
    of_experts = tallies[EXPERTS]
    group = model.moe.group_tokens(sequence_length)
    found["losses"] |= losses(of_experts, model.moe.losses, group, sequence_length)
    found["statistics"] |= statistics(of_experts)
  return found


def losses(of_layers: Tally, names: Sequence[str], group_tokens: int, sequence_length: int) -> dict[str, jax.Array]:
  """The auxiliary losses of routers over experts by name, float32 [L].

  Args:
    of_layers: what they count, with a leading dimension of layers.
    names: which losses, as `MoE.losses` has them.
    group_tokens: M.
    sequence_length: T.
  """
  unit = math.gcd(group_tokens, sequence_length)

  def balance(tokens: int | None) -> Callable[[Tally], jax.Array]:
    """The loss over sets of so many tokens, None for all."""
    sets = tokens and tokens // unit
    return lambda of_layer: balance_loss(*(_joined(of_layer[name], sets) for name in ("choices", "probs", "tokens")))

  of_layer = {
    "load_balance": balance(group_tokens),
    "sequence_balance": balance(sequence_length),
    "global_balance": balance(None),
    "router_z": router_z_loss,
    "mutual_information": mutual_information_loss,
  }
  return {name: jax.vmap(of_layer[name])(of_layers) for name in names}


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


def router_z_loss(of_layer: Tally) -> jax.Array:
  """Mean squared log-normaliser over real tokens (ST-MoE, arXiv 2202.08906, equation 5)."""
  return jnp.sum(of_layer["squared_normalizer"]) / jnp.maximum(jnp.sum(of_layer["tokens"]), 1)


def mutual_information_loss(of_layer: Tally) -> jax.Array:
  """-H(e) + mean of H(e|x), in nats: minus what a token tells of its expert (DS-MoE, arXiv 2404.05567, equation 5)."""
  tokens = jnp.maximum(jnp.sum(of_layer["tokens"]), 1)
  return jnp.sum(of_layer["entropy"]) / tokens - _entropy(jnp.sum(of_layer["probs"], axis=(0, 1)) / tokens)


def statistics(of_layers: Tally) -> dict[str, jax.Array]:
  """Of each layer: `load` [L, E], each expert's share of the choices before any are dropped; `entropy`, the mean of a
  real token's probabilities in nats, log E when the router does not care; `choices_per_token`; `dropped_fraction`."""
  count_LE = jnp.sum(of_layers["choices"], axis=(1, 2))
  choices_L = jnp.maximum(jnp.sum(count_LE, axis=-1), 1.0)
  return {
    "load": count_LE / choices_L[:, None],
    "entropy": _per_token(of_layers, "entropy"),
    "choices_per_token": jnp.sum(count_LE, axis=-1) / jnp.maximum(jnp.sum(of_layers["tokens"], axis=(1, 2)), 1),
    "dropped_fraction": jnp.sum(of_layers["dropped"], axis=(1, 2)) / choices_L,
  }


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


def _sets(tokens: tuple[int, ...], sequence_length: int) -> Callable[[jax.Array], jax.Array]:
  """The function that adds up [O, U, M, ...] to [O, S, ...]: a set lies in one group and in one sequence."""
  O, U, M = tokens
  unit = math.gcd(M, sequence_length)

  def in_set(x: jax.Array) -> jax.Array:
    return jnp.sum(x.astype(jnp.float32).reshape(O, U * M // unit, unit, *x.shape[3:]), axis=2)

  return in_set


def _joined(x: jax.Array, sets: int | None) -> jax.Array:
  """[O, S] or [O, S, E] with so many sets in a row added up, None for all: [X] or [X, E]."""
  x = x.reshape(-1, *x.shape[2:])
  return jnp.sum(x.reshape(-1, sets or len(x), *x.shape[1:]), axis=1)


def _per_token(of_layers: Tally, name: str) -> jax.Array:
  return jnp.sum(of_layers[name], axis=(1, 2)) / jnp.maximum(jnp.sum(of_layers["tokens"], axis=(1, 2)), 1)


def _entropy(probs_XE: jax.Array) -> jax.Array:
  terms_XE = jnp.where(probs_XE > 0, probs_XE * jnp.log(jnp.maximum(probs_XE, 1e-30)), 0.0)
  return -jnp.sum(terms_XE, axis=-1)
