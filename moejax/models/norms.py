"""Normalization.

D embed
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config.model import Model


class RMSNorm(nnx.Module):
  """x / rms(x) x scale over the last dimension, in float32 (arXiv 1910.07467)."""

  def __init__(self, width: int, epsilon: float, name: str | None, zero_centered: bool = False):
    initial = jnp.zeros if zero_centered else jnp.ones
    self.scale_D = nnx.Param(initial((width,), jnp.float32), names=(name,))
    self.epsilon, self.zero_centered = epsilon, zero_centered

  def __call__(self, x: jax.Array) -> jax.Array:
    with jax.named_scope("norm"):
      scale = self.scale_D[...].reshape((1,) * (x.ndim - 1) + (-1,))
      return (_over_rms(x, self.epsilon) * (1.0 + scale if self.zero_centered else scale)).astype(x.dtype)


class LayerNorm(nnx.Module):
  """(x - mean(x)) / deviation(x) x scale + bias over the last dimension, in float32 (arXiv 1607.06450)."""

  def __init__(self, width: int, epsilon: float, name: str | None):
    self.scale_D = nnx.Param(jnp.ones((width,), jnp.float32), names=(name,))
    self.bias_D = nnx.Param(jnp.zeros((width,), jnp.float32), names=(name,))
    self.epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    with jax.named_scope("norm"):
      x32 = x.astype(jnp.float32)
      x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
      inverse_deviation = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
      scale, bias = (x.reshape((1,) * (x32.ndim - 1) + (-1,)) for x in (self.scale_D[...], self.bias_D[...]))
      return (x32 * inverse_deviation * scale + bias).astype(x.dtype)


def residual_norm(model: Model) -> RMSNorm | LayerNorm:
  """A norm of the width of the residual stream."""
  if model.norm == "layer":
    return LayerNorm(model.d_model, model.norm_epsilon, "embed")
  return inner_norm(model, model.d_model, "embed")


def inner_norm(model: Model, width: int, name: str | None = None) -> RMSNorm:
  """An RMSNorm within attention."""
  return RMSNorm(width, model.norm_epsilon, name, model.norm == "zero_centered_rms")


def unit_rms(x: jax.Array, epsilon: float) -> jax.Array:
  """x / rms(x) over the last dimension, without a scale."""
  with jax.named_scope("norm"):
    return _over_rms(x, epsilon).astype(x.dtype)


def _over_rms(x: jax.Array, epsilon: float) -> jax.Array:
  x32 = x.astype(jnp.float32)
  return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
