"""The training objective: cross-entropy of the next token plus auxiliary losses times their coefficients.

Each loss and metric is first summed over the batch (`loss_sums`) and then divided (`objective`), so that the sums over
microbatches give the values of the whole batch.

B batch  T query position  D embed  L stacked layers
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.config.model import Model
from moejax.config.training import Losses
from moejax.errors import UserError
from moejax.models.moe.router_counts import RouterSums, TokenCounts, sum_counts, token_counts
from moejax.models.moe.router_metrics import router_metrics
from moejax.models.transformer import Transformer

Batch = dict[str, jax.Array]
"""tokens, targets, segments, positions: int32 [B, T]; weights: float32 [B, T], 0 for targets that are ignored."""

Metrics = dict[str, jax.Array]

LossSums = dict[str, RouterSums]
"""The sums of each kind of router, and of TEXT: `loss` and `z`, weighted by the weights of targets."""

TEXT = "text"


class Denominators(NamedTuple):
  """The denominators of the losses and metrics of a whole batch."""

  weight: jax.Array
  """The sum of the weights of the targets."""
  tokens: TokenCounts


def denominators(batch: Batch, model: Model) -> Denominators:
  """The denominators of a whole batch."""
  T = batch["tokens"].shape[1]
  group = model.moe.group_tokens(T) if model.moe else T
  return Denominators(jnp.maximum(jnp.sum(batch["weights"]), 1.0), token_counts(batch["segments"] > 0, group))


def loss_sums(model: Transformer, batch: Batch, keys_B: jax.Array | None = None) -> LossSums:
  """Returns the sums over a batch, or over a part of it, from which losses and metrics are computed.

  Args:
    model: the transformer.
    batch: rows that contain whole routing groups.
    keys_B: random keys of the sequences, for the noise of routers. None disables noise.
  """
  x_BTD, of_routers = router_sums(model, batch, keys_B)
  scores = model.score(x_BTD, batch["targets"])
  with jax.named_scope("loss"):
    terms_BT = {"loss": scores.loss_BT, "z": jnp.square(scores.log_normalizer_BT)}
    of_text = {name: jnp.sum(term_BT * batch["weights"]) for name, term_BT in terms_BT.items()}
  return {TEXT: of_text} | of_routers


def router_sums(model: Transformer, batch: Batch, keys_B: jax.Array | None = None) -> tuple[jax.Array, LossSums]:
  """Returns x_BTD and the sums of routers alone. The arguments are those of `loss_sums`."""
  x_BTD, counts = model(batch["tokens"], batch["segments"], batch["positions"], keys_B)
  T, moe = x_BTD.shape[1], model.model.moe
  with jax.named_scope("router"):
    return x_BTD, {kind: sum_counts(of_kind, moe.group_tokens(T) if moe else T, T) for kind, of_kind in counts.items()}


def objective(sums: LossSums, by: Denominators, model: Model, losses: Losses) -> tuple[jax.Array, Metrics]:
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
    (averaged over the layers that have it) and `router/NAME` by layer.

  Raises:
    UserError: If a loss has a coefficient, but no layer returns it.
  """
  auxiliary = router_metrics(sums, by.tokens, model)
  metrics = {"loss": sums[TEXT]["loss"] / by.weight, "loss/z": sums[TEXT]["z"] / by.weight}
  metrics |= {f"loss/{name}": jnp.mean(loss_L) for name, loss_L in auxiliary.losses.items()}
  total = metrics["loss"]
  for name, coefficient in dataclasses.asdict(losses).items():
    if coefficient and f"loss/{name}" not in metrics:
      raise UserError(f"training.losses.{name}={coefficient}, but no layer returns that loss; set it to 0")
    if coefficient:
      total = total + coefficient * metrics[f"loss/{name}"]
  metrics |= {f"router/{name}": value for name, value in auxiliary.statistics.items()}
  return total, metrics
