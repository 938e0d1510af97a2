"""Root mean square normalization."""

import jax.numpy as jnp
import numpy as np

from moejax.models.norms import RMSNorm


def test_rms_norm_divides_by_the_root_mean_square():
  norm = RMSNorm(4, 0.0, "embed")
  norm.scale_D[...] = jnp.array([1.0, 2.0, 1.0, 1.0])
  np.testing.assert_allclose(norm(jnp.array([[1.0, 1.0, 7.0, 7.0]])), [[0.2, 0.4, 1.4, 1.4]], rtol=1e-6)


def test_rms_norm_keeps_the_type_and_computes_in_float32():
  out = RMSNorm(2, 1e-5, "embed")(jnp.array([[300.0, 300.0]], jnp.bfloat16))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), 1.0)
