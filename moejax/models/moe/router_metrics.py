"""Computes auxiliary losses and metrics of all routers from their sums.

E experts  L stacked layers
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config.model import Model
from moejax.models.moe.losses import balance_loss, mutual_information_loss
from moejax.models.moe.router_counts import CHOSEN, DEPTHS, EXPERTS, HEADS, RouterSums, TokenCounts


class RouterMetrics(NamedTuple):
  """Values by name, each with a leading dimension of the layers that have it."""

  losses: dict[str, jax.Array]
  statistics: dict[str, jax.Array]


def router_metrics(
  sums: Mapping[str, RouterSums], counts: TokenCounts, chosen: TokenCounts, config: Model
) -> RouterMetrics:
  """The auxiliary losses and statistics of all layers.

  Args:
    sums: of each kind of router.
    counts: of the same batch.
    chosen: of its tokens that go through layers which others skip.
    config: says which losses there are.
  """
  found = RouterMetrics({}, {})
  if HEADS in sums:
    found.losses["attention_mutual_information"] = _mutual_information_loss(sums[HEADS], counts)
    found.statistics["attention_entropy"] = sums[HEADS]["entropy"] / counts.tokens
  of_experts = [(sums[kind], by) for kind, by in ((EXPERTS, counts), (CHOSEN, chosen)) if kind in sums]
  if of_experts:
    assert config.moe
    losses = config.moe.losses
    merged = joined([RouterMetrics(auxiliary_losses(of, by, losses), statistics(of, by)) for of, by in of_experts])
    if len(of_experts) > 1:
      # From those of all tokens and those of chosen ones to the order of the layers.
      of_layer = np.argsort(np.argsort(config.routed_sparse_layers, kind="stable"))
      merged = jax.tree.map(lambda x_L: x_L[of_layer], merged)
    found.losses.update(merged.losses)
    found.statistics.update(merged.statistics)
  if DEPTHS in sums:
    through_L, dropped_L = (sums[DEPTHS][name].astype(jnp.float32) for name in ("through", "dropped"))
    found.losses["depths"] = sums[DEPTHS]["loss"] / (counts.tokens if config.depths.has_predictor else counts.sequences)
    found.statistics["depth_share"] = through_L / counts.tokens
    found.statistics["depth_dropped_fraction"] = dropped_L / jnp.maximum(through_L + dropped_L, 1.0)
  return found


def joined(parts: Sequence[RouterMetrics]) -> RouterMetrics:
  """The metrics of several parts of a model, of which each may lack some, with all layers one after the other."""

  def of_all(names: Sequence[Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    found = dict.fromkeys(name for part in names for name in part)
    return {name: jnp.concatenate([part[name] for part in names if name in part]) for name in found}

  return RouterMetrics(of_all([part.losses for part in parts]), of_all([part.statistics for part in parts]))


def auxiliary_losses(sums: RouterSums, counts: TokenCounts, names: Sequence[str]) -> dict[str, jax.Array]:
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
    "mutual_information": lambda: _mutual_information_loss(sums, counts),
  }
  return {name: by_name[name]() for name in names}


def statistics(sums: RouterSums, counts: TokenCounts) -> dict[str, jax.Array]:
  """Statistics of routers over experts by name.

  `choices` [L, E] in int32 counts how often each expert is chosen, before any choice is dropped; `load` [L, E] is its
  share of the choices. `entropy` [L] is the mean entropy of a token's probabilities in nats, log E for a uniform
  router. `choices_per_token` [L] and `dropped_fraction` [L] are means over the batch.
  """
  choices_L = jnp.sum(sums["choices"], axis=-1).astype(jnp.float32)
  return {
    "choices": sums["choices"],
    "load": sums["choices"] / jnp.maximum(choices_L, 1.0)[:, None],
    "entropy": sums["entropy"] / counts.tokens,
    "choices_per_token": choices_L / counts.tokens,
    "dropped_fraction": sums["dropped"] / jnp.maximum(choices_L, 1.0),
  }


def _mutual_information_loss(sums: RouterSums, counts: TokenCounts) -> jax.Array:
  return mutual_information_loss(sums["entropy"] / counts.tokens, sums["probs"] / counts.tokens)
