"""Weights have the deviation that they are declared with."""

import jax.numpy as jnp
from flax import nnx

from moejax.models.weights import weight


def test_weights_have_the_stated_deviation():
  drawn = weight(nnx.Rngs(params=0), (400, 400), (None, None), fan_in=400, gain=0.5)
  assert abs(float(jnp.std(drawn[...])) - 0.5 / 20) < 2e-4
