"""Root mean square normalization."""

import jax.numpy as jnp
import numpy as np

from moejax.models.norms import LayerNorm, RMSNorm, unit_rms


def test_rms_norm_divides_by_the_root_mean_square():
  norm = RMSNorm(4, 0.0, "embed")
  norm.scale_D[...] = jnp.array([1.0, 2.0, 1.0, 1.0])
  np.testing.assert_allclose(norm(jnp.array([[1.0, 1.0, 7.0, 7.0]])), [[0.2, 0.4, 1.4, 1.4]], rtol=1e-6)


def test_rms_norm_keeps_the_type_and_computes_in_float32():
  out = RMSNorm(2, 1e-5, "embed")(jnp.array([[300.0, 300.0]], jnp.bfloat16))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), 1.0)


def test_unit_rms_is_the_norm_without_a_scale():
  x = jnp.array([[0.3, -2.0, 0.01], [3.0, 0.0, -4.0]])
  np.testing.assert_array_equal(unit_rms(x, 1e-3), RMSNorm(3, 1e-3, None)(x))
  np.testing.assert_allclose(unit_rms(x, 0.0)[1], np.array([3.0, 0.0, -4.0]) / np.sqrt(25 / 3), rtol=1e-6)
  assert unit_rms(x.astype(jnp.bfloat16), 1e-3).dtype == jnp.bfloat16


def test_a_zero_centered_scale_is_one_plus_its_parameter():
  x, plain, centered = jnp.array([[1.0, -2.0, 3.0]]), RMSNorm(3, 1e-5, None), RMSNorm(3, 1e-5, None, zero_centered=True)
  np.testing.assert_array_equal(plain(x), centered(x))
  plain.scale_D[...], centered.scale_D[...] = jnp.full(3, 1.5), jnp.full(3, 0.5)
  np.testing.assert_allclose(plain(x), centered(x), rtol=1e-6)


def test_layer_norm_subtracts_the_mean_and_has_a_bias():
  norm = LayerNorm(4, 0.0, "embed")
  norm.scale_D[...], norm.bias_D[...] = jnp.array([1.0, 2.0, 1.0, 1.0]), jnp.array([0.0, 0.0, 5.0, 0.0])
  np.testing.assert_allclose(norm(jnp.array([[1.0, 1.0, 3.0, 3.0]])), [[-1.0, -2.0, 6.0, 1.0]], rtol=1e-6)
