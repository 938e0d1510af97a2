"""Stacked and separate layers hold the same numbers."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.models.stacking import separate, stack
from moejax.models.weights import weight


class Half(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.w = weight(rngs, (3, 2), ("embed", "mlp"), fan_in=3)


def test_stack_adds_a_named_layer_dimension_and_draws_each_layer_anew():
  stacked = stack(Half, 4, nnx.Rngs(params=0))
  assert stacked.w.names == ("layers", "embed", "mlp")
  assert stacked.w.shape == (4, 3, 2)
  assert len({float(layer[0, 0]) for layer in stacked.w[...]}) == 4


def test_separate_layers_hold_the_numbers_of_the_stack():
  stacked, apart = stack(Half, 4, nnx.Rngs(params=0)), separate(Half, 4, nnx.Rngs(params=0))
  np.testing.assert_array_equal(stacked.w[...], jnp.stack([layer.w[...] for layer in apart]))
