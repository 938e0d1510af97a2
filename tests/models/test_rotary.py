"""Rotary embeddings rotate by the position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models.rotary import rotary_angles, rotate


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

  def product(position_q, position_k):
    turned = [
      rotate(x, rotary_angles(jnp.array([[position]]), 8, 100.0)) for x, position in ((q, position_q), (k, position_k))
    ]
    return float(jnp.sum(turned[0] * turned[1]))

  assert abs(product(5, 3) - product(105, 103)) < 1e-4
  assert abs(product(5, 3) - product(5, 4)) > 1e-3
  turned = rotate(q, rotary_angles(jnp.array([[7]]), 8, 100.0))
  np.testing.assert_allclose(jnp.linalg.norm(turned), jnp.linalg.norm(q), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_rotation_by_a_product_is_the_very_same(dtype):
  x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8), dtype)
  angles = rotary_angles(jnp.arange(10).reshape(2, 5), 8, 100.0)
  np.testing.assert_allclose(
    rotate(x, angles, by_product=True).astype(jnp.float32), rotate(x, angles).astype(jnp.float32), rtol=1e-6, atol=1e-6
  )


def test_position_zero_is_not_rotated():
  x = jax.random.normal(jax.random.key(0), (1, 1, 2, 8))
  np.testing.assert_array_equal(rotate(x, rotary_angles(jnp.array([[0]]), 8, 100.0)), x)


def test_positions_beyond_256_differ_in_the_angles():
  cosine, _ = rotary_angles(jnp.array([[256, 257]]), 8, 10_000.0)
  assert float(jnp.abs(cosine[0, 0] - cosine[0, 1]).max()) > 0.1
