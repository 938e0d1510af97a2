"""Skips the update of a step whose loss or gradient is NaN or infinite, or whose loss is a spike.

The decision is made inside the compiled step, so that neither the host nor the next step waits for it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moejax.config.training import Anomalies

WARMUP_STEPS = 20
"""Number of accepted steps before spikes are detected."""
RECENT_STEPS = 50
"""Approximate number of accepted steps over which the mean and the variance of the loss are computed."""


class Watched(NamedTuple):
  """The state of an optimizer, and statistics of the recent loss."""

  optimizer: optax.OptState
  loss_mean: jax.Array
  loss_variance: jax.Array
  accepted: jax.Array
  """Number of accepted steps, int32."""


def watched(
  optimizer: optax.GradientTransformationExtraArgs, anomalies: Anomalies
) -> optax.GradientTransformationExtraArgs:
  """Extends the state of an optimizer by statistics of the recent loss if spikes are skipped."""
  if anomalies.spike is None:
    return optimizer

  def init(parameters: Any) -> Watched:
    zero = jnp.zeros((), jnp.float32)
    return Watched(optimizer.init(parameters), zero, zero, jnp.zeros((), jnp.int32))

  def update(gradients: Any, state: Any, parameters: Any = None, **others: Any) -> tuple[Any, Watched]:
    updates, inner = optimizer.update(gradients, state.optimizer, parameters, **others)
    return updates, state._replace(optimizer=inner)

  return optax.GradientTransformationExtraArgs(init, update)


def is_accepted(anomalies: Anomalies, optimizer: Any, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
  """Whether the update of a step with this loss and gradient is applied. `optimizer` is the state before the step."""
  accepted = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  if anomalies.spike is not None:
    limit = optimizer.loss_mean + anomalies.spike * jnp.sqrt(optimizer.loss_variance)
    accepted &= (loss <= limit) | (optimizer.accepted < WARMUP_STEPS)
  return accepted


def keep_unless(accepted: jax.Array, new: Any, old: Any) -> Any:
  """`new` if the step is accepted, else `old`. Selects element by element, so that the compiler needs no copy."""
  return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, old)


def with_loss(anomalies: Anomalies, optimizer: Any, loss: jax.Array) -> Any:
  """The state of the optimizer after an accepted step with this loss."""
  if anomalies.spike is None:
    return optimizer
  weight = jnp.maximum(1.0 / (optimizer.accepted + 1.0), 1.0 / RECENT_STEPS)
  deviation = loss - optimizer.loss_mean
  mean = optimizer.loss_mean + weight * deviation
  variance = optimizer.loss_variance + weight * (deviation * (loss - mean) - optimizer.loss_variance)
  return optimizer._replace(loss_mean=mean, loss_variance=variance, accepted=optimizer.accepted + 1)
