"""What routing costs and how evenly it loads: auxiliary losses, statistics, and the bias that balances without a loss.

A layer only counts, within sets of its own device's tokens (`tally`). The sums over all sets (`add_up`), and losses and
statistics from them, follow for all layers at once: computed in the layer, each would be a sum over all devices that
the next layer waits for. Sums of the parts of a batch add up to those of the batch, whatever is padding in each.

O outer batch  U routing groups  M tokens in a group  B batch  T position  S sets of N tokens in an outer batch
E experts  L layers that have the router  X any number of sets
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.config.model import Model
from moejax.models.moe.routing import Routing

Auxiliary = dict[str, dict[str, jax.Array]]
"""`losses` and `statistics` by name, with a leading dimension of the layers that have them."""

Tally = dict[str, jax.Array]
"""Sums over sets of tokens, float32: `tokens` [O, S], `probs` [O, S, E], `entropy` [O, S] in nats; of a router over
experts also `choices` [O, S, E], `squared_normalizer` [O, S] and `dropped` [O, U]. Padding counts in none."""

Sums = dict[str, jax.Array]
"""A tally with a leading dimension of layers, summed over sets: `probs` [L, E], `entropy` [L]; of a router over experts
also `choices` [L, E] and `dropped` [L], int32, `squared_normalizer` [L], and the balance loss of each set of tokens:
`load_balance` [L] summed over groups, `sequence_balance` [L] over sequences."""

EXPERTS, HEADS = "experts", "heads"
"""Routers of a layer, by what they choose."""

BIAS = "bias_E"
"""Name of a router's bias among its layer's parameters."""


class Counts(NamedTuple):
  """What losses and statistics of a whole batch are means over, float32, no less than 1."""

  tokens: jax.Array
  """Real tokens."""
  groups: jax.Array
  """Routing groups that have any."""
  sequences: jax.Array
  """Sequences that have any."""


def count_batch(valid_BT: jax.Array, group_tokens: int) -> Counts:
  """Counts of a whole batch.

  Args:
    valid_BT: False for padding.
    group_tokens: M.
  """
  of_groups, of_sequences = (jnp.any(x, axis=-1) for x in (valid_BT.reshape(-1, group_tokens), valid_BT))
  return Counts(*(jnp.maximum(jnp.sum(x, dtype=jnp.float32), 1.0) for x in (valid_BT, of_groups, of_sequences)))


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


def add_up(of_layers: Tally, group_tokens: int, sequence_length: int) -> Sums:
  """The sums over all sets.

  Args:
    of_layers: what the routers of a kind count, with a leading dimension of layers.
    group_tokens: M.
    sequence_length: T.
  """
  sums = {name: jnp.sum(of_layers[name], axis=(1, 2)) for name in ("probs", "entropy")}
  if "choices" not in of_layers:
    return sums
  # Of integers: float32 loses count above 2^24.
  sums |= {name: jnp.sum(of_layers[name].astype(jnp.int32), axis=(1, 2)) for name in ("choices", "dropped")}
  sums["squared_normalizer"] = jnp.sum(of_layers["squared_normalizer"], axis=(1, 2))
  unit = math.gcd(group_tokens, sequence_length)
  for name, tokens in (("load_balance", group_tokens), ("sequence_balance", sequence_length)):

    def balance(of_layer: Tally, sets: int = tokens // unit) -> jax.Array:
      return jnp.sum(balance_loss(*(_joined(of_layer[name], sets) for name in ("choices", "probs", "tokens"))))

    sums[name] = jax.vmap(balance)(of_layers)
  return sums


def summarise(sums: Mapping[str, Sums], counts: Counts, model: Model) -> Auxiliary:
  """The losses and statistics of all layers.

  Args:
    sums: of each kind of router.
    counts: of the same batch.
    model: says which losses there are.
  """
  found: Auxiliary = {"losses": {}, "statistics": {}}
  if HEADS in sums:
    found["losses"]["attention_mutual_information"] = mutual_information_loss(sums[HEADS], counts)
    found["statistics"]["attention_entropy"] = sums[HEADS]["entropy"] / counts.tokens
  if EXPERTS in sums:
    assert model.moe
    found["losses"] |= losses(sums[EXPERTS], counts, model.moe.losses)
    found["statistics"] |= statistics(sums[EXPERTS], counts)
  return found


def losses(sums: Sums, counts: Counts, names: Sequence[str]) -> dict[str, jax.Array]:
  """The auxiliary losses of routers over experts by name, float32 [L].

  Args:
    sums: of a batch.
    counts: of the same batch.
    names: which losses, as `MoE.losses` has them.
  """
  tokens_L = jnp.broadcast_to(counts.tokens, sums["entropy"].shape)
  by_name: dict[str, Callable[[], jax.Array]] = {
    "load_balance": lambda: sums["load_balance"] / counts.groups,
    "sequence_balance": lambda: sums["sequence_balance"] / counts.sequences,
    "global_balance": lambda: balance_loss(sums["choices"].astype(jnp.float32), sums["probs"], tokens_L),
    # Mean squared log-normalizer of real tokens (ST-MoE, arXiv 2202.08906, equation 5).
    "router_z": lambda: sums["squared_normalizer"] / counts.tokens,
    "mutual_information": lambda: mutual_information_loss(sums, counts),
  }
  return {name: by_name[name]() for name in names}


def balance_loss(count_XE: jax.Array, prob_XE: jax.Array, tokens_X: jax.Array) -> jax.Array:
  """E x sum over experts of (share of choices) x (mean probability) of each set of tokens [X]: 1 when balanced, E when
  one expert gets all, 0 without tokens (GShard, arXiv 2006.16668, algorithm 1; all A choices count).

  Args:
    count_XE: choices of each expert.
    prob_XE: sum of its probabilities.
    tokens_X: real tokens.
  """
  share_XE = count_XE / jnp.maximum(jnp.sum(count_XE, axis=-1, keepdims=True), 1.0)
  prob_XE = prob_XE / jnp.maximum(tokens_X, 1)[..., None]
  return count_XE.shape[-1] * jnp.sum(jax.lax.stop_gradient(share_XE) * prob_XE, axis=-1)


def mutual_information_loss(sums: Sums, counts: Counts) -> jax.Array:
  """-H(e) + mean of H(e|x), in nats [L]: minus what a token tells of its expert (DS-MoE, arXiv 2404.05567, equation
  5)."""
  return sums["entropy"] / counts.tokens - _entropy(sums["probs"] / counts.tokens)


def statistics(sums: Sums, counts: Counts) -> dict[str, jax.Array]:
  """Of each layer: `choices` [L, E] of each expert before any are dropped, int32, and `load` [L, E], their shares;
  `entropy`, the mean of a real token's probabilities in nats, log E when the router does not care;
  `choices_per_token`; `dropped_fraction`."""
  choices_L = jnp.sum(sums["choices"], axis=-1).astype(jnp.float32)
  return {
    "choices": sums["choices"],
    "load": sums["choices"] / jnp.maximum(choices_L, 1.0)[:, None],
    "entropy": sums["entropy"] / counts.tokens,
    "choices_per_token": choices_L / counts.tokens,
    "dropped_fraction": sums["dropped"] / jnp.maximum(choices_L, 1.0),
  }


def update_bias(parameters: Mapping[str, Any], choices_LE: jax.Array, rate: float) -> dict[str, Any]:
  """The parameters with every router's bias moved: up by `rate` for experts below the mean load, down for those above
  (arXiv 2408.15664, algorithm 1).

  Args:
    parameters: of the whole model.
    choices_LE: each expert's choices in the step, integers, in the order of the sparse layers.
    rate: size of the move.
  """
  E = choices_LE.shape[-1]
  # In integers: a mean in float32 may differ from loads that are all equal.
  total_L1 = jnp.sum(choices_LE, axis=-1, keepdims=True)
  whole_L1, rest_L1 = total_L1 // E, total_L1 % E
  above_LE = choices_LE > whole_L1
  below_LE = (choices_LE < whole_L1) | (~above_LE & (rest_L1 > 0))
  direction_LE = below_LE.astype(jnp.float32) - above_LE.astype(jnp.float32)
  layer = 0

  def moved(path: tuple, leaf: jax.Array) -> jax.Array:
    nonlocal layer
    if path[-1].key != BIAS:
      return leaf
    layers = leaf.size // E  # all of them where they are stacked, else one after the other
    here = direction_LE[layer : layer + layers].reshape(leaf.shape)
    layer += layers
    return leaf + rate * here

  return jax.tree_util.tree_map_with_path(moved, parameters)


def _sets(tokens: tuple[int, ...], sequence_length: int) -> Callable[[jax.Array], jax.Array]:
  """The function that adds up [O, U, M, ...] to [O, S, ...]: a set lies in one group and in one sequence."""
  O, U, M = tokens
  unit = math.gcd(M, sequence_length)

  def in_set(x: jax.Array) -> jax.Array:
    return jnp.sum(x.astype(jnp.float32).reshape(O, U * M // unit, unit, *x.shape[3:]), axis=2)

  return in_set


def _joined(x: jax.Array, sets: int) -> jax.Array:
  """[O, S] or [O, S, E] with so many sets in a row added up: [X] or [X, E]."""
  x = x.reshape(-1, *x.shape[2:])
  return jnp.sum(x.reshape(-1, sets, *x.shape[1:]), axis=1)


def _entropy(probs_XE: jax.Array) -> jax.Array:
  terms_XE = jnp.where(probs_XE > 0, probs_XE * jnp.log(jnp.maximum(probs_XE, 1e-30)), 0.0)
  return -jnp.sum(terms_XE, axis=-1)
