"""The objective: cross-entropy of the next token, and the auxiliary losses that have a coefficient.

B batch  T position  D embed  V vocab  M = B x T tokens
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.config.training import Losses
from moejax.errors import UserError
from moejax.kernels.cross_entropy import cross_entropy
from moejax.models.transformer import Transformer

Batch = dict[str, jax.Array]
"""tokens, targets, segments, positions: int32 [B, T]; weights: float32 [B, T], 0 where a target does not count."""

Metrics = dict[str, jax.Array]


def objective(
  model: Transformer,
  batch: Batch,
  losses: Losses,
  total_weight: jax.Array,
  parts: int = 1,
  key: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """The number that is minimised, and what it is made of.

  Args:
    model: the transformer.
    batch: one batch, or one of the equal parts of it under gradient accumulation.
    losses: coefficients.
    total_weight: sum of the weights of the whole batch.
    parts: parts of the batch; the objectives, gradients and metrics of all parts add up to the whole's.
    key: of the noise of routers; None has no noise.

  Returns:
    The objective, and metrics: `loss` (cross-entropy in nats per token), `loss/NAME` of each auxiliary loss (mean over
    the layers that have it) and `router/NAME` by layer.

  Raises:
    UserError: a coefficient whose loss no layer returns.
  """
  x_BTD, auxiliary = model(batch["tokens"], batch["segments"], batch["positions"], key)
  logits_MV = model.logits(x_BTD.reshape(-1, x_BTD.shape[-1]))
  logits_MV = model.partitioner.constrain(logits_MV, "batch", "vocab")
  with jax.named_scope("loss"):
    weights_M = batch["weights"].reshape(-1)
    whole = model.partitioner.shards("vocab") == 1
    loss_M, log_normalizer_M = cross_entropy(logits_MV, batch["targets"].reshape(-1), whole)
    metrics = {
      "loss": jnp.sum(loss_M * weights_M) / total_weight,
      "loss/z": jnp.sum(jnp.square(log_normalizer_M) * weights_M) / total_weight,
    }
    metrics |= {f"loss/{name}": jnp.mean(loss_L) / parts for name, loss_L in auxiliary.get("losses", {}).items()}
    total = metrics["loss"]
    for name, coefficient in dataclasses.asdict(losses).items():
      if coefficient and f"loss/{name}" not in metrics:
        raise UserError(f"training.losses.{name}={coefficient} and no layer returns that loss; set it to 0")
      if coefficient:
        total = total + coefficient * metrics[f"loss/{name}"]
  metrics |= {f"router/{name}": value / parts for name, value in auxiliary.get("statistics", {}).items()}
  return total, metrics
