"""Declares and initializes weights."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.partitioning import Names


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], names: Names, fan_in: int, gain: float = 1.0) -> nnx.Param:
  """A float32 weight from a normal distribution, truncated at two standard deviations, with standard deviation
  gain / sqrt(fan_in).

  | weight                                        | fan_in          | gain            |
  |-----------------------------------------------|-----------------|-----------------|
  | embedding, output projection                  | D               | 1               |
  | query, key, value, router, gate, up           | D               | 1               |
  | attention output, feed-forward down           | N x H, F        | 1 / sqrt(2 L)   |
  """
  # 0.8796 is the standard deviation of a unit normal truncated at two standard deviations.
  scale = gain / math.sqrt(fan_in) / 0.87962566
  value = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32) * scale
  return nnx.Param(value, names=names)


def residual_gain(num_layers: int) -> float:
  """Gain of weights that write to the residual stream, so that 2 L writes sum to unit variance (GPT-2)."""
  return 1.0 / math.sqrt(2 * num_layers)
