"""How weights are declared and initialized."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.partitioning import Names


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], names: Names, fan_in: int, gain: float = 1.0) -> nnx.Param:
  """A float32 matrix drawn from a normal, cut at two deviations, of deviation gain / sqrt(fan_in).

  | weight                                        | fan_in          | gain            |
  |-----------------------------------------------|-----------------|-----------------|
  | embedding, output projection                  | D               | 1               |
  | query, key, value, router, gate, up           | D               | 1               |
  | attention output, feed-forward down           | what they sum   | 1 / sqrt(2 L)   |
  """
  # 0.8796 is the deviation of a unit normal cut at two deviations.
  scale = gain / math.sqrt(fan_in) / 0.87962566
  value = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32) * scale
  return nnx.Param(value, names=names)


def residual_gain(num_layers: int) -> float:
  """Gain of what writes to the residual stream: 2 L writes add up to unit variance (GPT-2)."""
  return 1.0 / math.sqrt(2 * num_layers)
