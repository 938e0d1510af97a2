"""Norm, rotation and stacking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.models.layers import PRODUCTS, RMSNorm, keep, of_kept, rotary_angles, rotate, separate, stack, weight


def test_rms_norm_divides_by_the_root_mean_square():
  norm = RMSNorm(4, 0.0, "embed")
  norm.scale_D[...] = jnp.array([1.0, 2.0, 1.0, 1.0])
  np.testing.assert_allclose(norm(jnp.array([[1.0, 1.0, 7.0, 7.0]])), [[0.2, 0.4, 1.4, 1.4]], rtol=1e-6)


def test_rms_norm_keeps_the_type_and_computes_in_float32():
  out = RMSNorm(2, 1e-5, "embed")(jnp.array([[300.0, 300.0]], jnp.bfloat16))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), 1.0)


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


def test_weights_have_the_stated_deviation():
  drawn = weight(nnx.Rngs(params=0), (400, 400), (None, None), fan_in=400, gain=0.5)
  assert abs(float(jnp.std(drawn[...])) - 0.5 / 20) < 2e-4


@pytest.mark.parametrize(
  ("through", "roundings"), [(of_kept, 0), (lambda products: lambda x, w: products(keep(x), w), 1)]
)
def test_products_of_what_is_kept_take_it_as_it_is_and_only_their_backward_pass_has_the_copy(through, roundings):
  x, w, y = jax.random.normal(jax.random.key(0), (3, 4, 4))

  def loss(x, w):
    return jnp.sum(through(jnp.matmul)(jnp.sin(x), w) * y)

  policy = jax.checkpoint_policies.save_only_these_names(PRODUCTS)
  gradient = jax.grad(jax.checkpoint(loss, policy=policy, prevent_cse=False), argnums=(0, 1))
  program = str(jax.make_jaxpr(gradient)(x, w))
  assert program.count("= sin ") == 1, "kept, and not computed again"
  assert program.count("= reduce_precision") == roundings
  of_x, of_w = gradient(x, w)
  np.testing.assert_allclose(of_x, jnp.cos(x) * (y @ w.T), rtol=1e-5)
  np.testing.assert_allclose(of_w, jnp.sin(x).T @ y, rtol=1e-5)
