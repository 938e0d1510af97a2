"""The training objective: cross-entropy of the next token plus auxiliary losses times their coefficients.

Each loss and metric is first summed over the batch (`loss_sums`) and then divided (`objective`), so that the sums over
microbatches give the values of the whole batch.

B batch  T query position  D embed  L stacked layers  C capacity
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.config.model import Model
from moejax.config.training import Losses
from moejax.errors import UserError
from moejax.models.moe.router_counts import (
  CHOSEN,
  DEPTHS,
  RouterCounts,
  RouterSums,
  TokenCounts,
  sum_counts,
  sum_depths,
  token_counts,
)
from moejax.models.moe.router_metrics import joined, router_metrics
from moejax.models.multi_token import Tokens, tokens_ahead
from moejax.models.transformer import Transformer

Batch = dict[str, jax.Array]
"""tokens, targets, segments, positions: int32 [B, T]; weights: float32 [B, T], 0 for targets that are ignored."""

Metrics = dict[str, jax.Array]

LossSums = tuple[dict[str, RouterSums], ...]
"""The sums of each kind of router, and of TEXT: `loss` and `z`, weighted by the weights of targets. The first
dictionary is that of the model, and the others are those of its modules for multi-token prediction."""

TEXT = "text"


class Denominators(NamedTuple):
  """The denominators of the losses and metrics of a whole batch."""

  weight: jax.Array
  """The sum of the weights of the targets, at least 1."""
  tokens: TokenCounts
  chosen: TokenCounts
  """Of the tokens that go through layers which others skip (mixture of depths, kind `top_k`)."""
  targets: jax.Array
  """Number of targets with a weight."""


def denominators(batch: Batch, model: Model) -> tuple[Denominators, ...]:
  """The denominators of a whole batch: those of the model, and of each module for multi-token prediction."""
  T = batch["tokens"].shape[1]
  C = model.depths.slots(T)

  def of_depth(tokens: Tokens) -> Denominators:
    weight, targets = jnp.maximum(jnp.sum(tokens.weights_BT), 1.0), jnp.sum(tokens.weights_BT > 0)
    valid_BT = tokens.segments_BT > 0
    chosen_BC = jnp.arange(C)[None] < jnp.sum(valid_BT, axis=1, keepdims=True)
    of_all, of_chosen = (token_counts(x_BT, _group(model, x_BT.shape[1])) for x_BT in (valid_BT, chosen_BC))
    return Denominators(weight, of_all, of_chosen, targets)

  return tuple(map(of_depth, _tokens(batch, model)))


def _group(model: Model, length: int) -> int:
  """Number of tokens in a routing group, if sequences have this length."""
  return model.moe.group_tokens(length) if model.moe else length


def _tokens(batch: Batch, model: Model) -> list[Tokens]:
  """The tokens of the model and of each module for multi-token prediction."""
  tokens = Tokens(*(batch[name] for name in ("tokens", "targets", "segments", "positions", "weights")))
  return [tokens_ahead(tokens, depth) for depth in range(model.multi_token_depth + 1)]


def loss_sums(model: Transformer, batch: Batch, keys_B: jax.Array | None = None) -> LossSums:
  """Returns the sums over a batch, or over a part of it, from which losses and metrics are computed.

  Args:
    model: the transformer.
    batch: rows that contain whole routing groups.
    keys_B: random keys of the sequences, for the noise of routers. None disables noise.
  """
  features, sums = router_sums(model, batch, keys_B)
  of_depths = zip(features, _tokens(batch, model.model), sums, strict=True)
  return tuple({TEXT: _text_sums(model, x_BTD, tokens)} | of_routers for x_BTD, tokens, of_routers in of_depths)


def _text_sums(model: Transformer, x_BTD: jax.Array, tokens: Tokens) -> RouterSums:
  scores = model.score(x_BTD, tokens.targets_BT)
  with jax.named_scope("loss"):
    terms_BT = {"loss": scores.loss_BT, "z": jnp.square(scores.log_normalizer_BT)}
    return {name: jnp.sum(term_BT * tokens.weights_BT) for name, term_BT in terms_BT.items()}


def router_sums(model: Transformer, batch: Batch, keys_B: jax.Array | None = None) -> tuple[list[jax.Array], LossSums]:
  """Returns the features x_BTD of the model and of its modules for multi-token prediction, and the sums of routers
  alone. The arguments are those of `loss_sums`."""
  x_BTD, counts = model(batch["tokens"], batch["segments"], batch["positions"], keys_B)
  found = [(x_BTD, counts), *model.predict_ahead(x_BTD, _tokens(batch, model.model)[1:], keys_B)]
  T = x_BTD.shape[1]

  def summed(kind: str, counts: RouterCounts) -> RouterSums:
    length = model.model.depths.slots(T) if kind == CHOSEN else T
    return sum_depths(counts) if kind == DEPTHS else sum_counts(counts, _group(model.model, length), length)

  with jax.named_scope("router"):
    sums = tuple({kind: summed(kind, of_kind) for kind, of_kind in counts.items()} for _, counts in found)
  return [x_BTD for x_BTD, _ in found], sums


def objective(sums: LossSums, by: tuple[Denominators, ...], model: Model, losses: Losses) -> tuple[jax.Array, Metrics]:
  """Returns the loss that is minimized, and its parts.

  Args:
    sums: the sums of the whole batch, or of a part of it. For a loss that is a sum over tokens, the gradients of all
      parts add up to that of the whole batch. For the others (`Losses.of_whole_batch`) a part needs the sums of the
      whole batch.
    by: the denominators of the whole batch.
    model: determines which losses exist.
    losses: coefficients of the losses.

  Returns:
    The objective, and the metrics `loss` (cross-entropy in nats per token), `loss/NAME` for each auxiliary loss
    (averaged over the layers that have it, or over the depths of multi-token prediction) and `router/NAME` by layer,
    after which come those of the modules for multi-token prediction.

  Raises:
    UserError: If a loss has a coefficient, but no layer returns it.
  """
  of_depths = [router_metrics(sums, by.tokens, by.chosen, model) for sums, by in zip(sums, by, strict=True)]
  auxiliary = joined(of_depths)
  text, first = sums[0][TEXT], by[0]
  metrics = {"loss": text["loss"] / first.weight, "loss/z": text["z"] / first.weight}
  metrics |= {f"loss/{name}": jnp.mean(loss_L) for name, loss_L in auxiliary.losses.items()}
  metrics |= _of_multi_token(sums, by)
  total = metrics["loss"]
  for name, coefficient in dataclasses.asdict(losses).items():
    if coefficient and f"loss/{name}" not in metrics:
      raise UserError(f"training.losses.{name}={coefficient}, but no layer returns that loss; set it to 0")
    if coefficient:
      total = total + coefficient * metrics[f"loss/{name}"]
  metrics |= {f"router/{name}": value for name, value in auxiliary.statistics.items()}
  return total, metrics


def _of_multi_token(sums: LossSums, by: tuple[Denominators, ...]) -> Metrics:
  """The mean cross-entropy of multi-token prediction, and the cross-entropy and number of targets of each depth."""
  ahead = list(enumerate(zip(sums, by, strict=True)))[1:]
  if not ahead:
    return {}
  metrics = {f"loss/multi_token/depth_{depth}": sums[TEXT]["loss"] / by.weight for depth, (sums, by) in ahead}
  mean = jnp.mean(jnp.stack(list(metrics.values())))
  return {"loss/multi_token": mean} | metrics | {f"multi_token/targets/depth_{i}": by.targets for i, (_, by) in ahead}
