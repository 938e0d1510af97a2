"""Root mean square normalization.

D embed
"""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
  """x / rms(x) x scale over the last dimension, in float32 (arXiv 1910.07467)."""

  def __init__(self, width: int, epsilon: float, name: str | None):
    self.scale_D = nnx.Param(jnp.ones((width,), jnp.float32), names=(name,))
    self.epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    with jax.named_scope("norm"):
      x32 = x.astype(jnp.float32)
      inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
      scale = self.scale_D[...].reshape((1,) * (x.ndim - 1) + (-1,))
      return (x32 * inverse_rms * scale).astype(x.dtype)
