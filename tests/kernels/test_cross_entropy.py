"""Cross-entropy and its gradient against plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.cross_entropy import cross_entropy


def plain(logits_MV, targets_M):
  log_normalizer_M = jax.nn.logsumexp(logits_MV, axis=-1)
  return log_normalizer_M - logits_MV[jnp.arange(len(targets_M)), targets_M], log_normalizer_M


@pytest.mark.parametrize("whole_vocabulary", [True, False])
def test_values_and_gradients_of_both_outputs_equal_plain_jax(whole_vocabulary):
  logits_MV = 3.0 * jax.random.normal(jax.random.key(0), (6, 11))
  targets_M = jnp.array([0, 10, 3, 3, 7, 1])
  of_loss_M, of_normalizer_M = jax.random.normal(jax.random.key(1), (2, 6))

  def scalar(function):
    def total(logits_MV):
      loss_M, log_normalizer_M = function(logits_MV)
      return jnp.sum(loss_M * of_loss_M) + jnp.sum(jnp.square(log_normalizer_M) * of_normalizer_M)

    return jax.jit(jax.value_and_grad(total))

  mine = scalar(lambda x: cross_entropy(x, targets_M, whole_vocabulary))(logits_MV)
  other = scalar(lambda x: plain(x, targets_M))(logits_MV)
  for a, b in zip(mine, other, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_logits_of_a_thousand_do_not_overflow():
  loss_M, _ = cross_entropy(jnp.array([[1000.0, 0.0], [-1000.0, 0.0]]), jnp.array([1, 0]), True)
  np.testing.assert_array_equal(loss_M, [1000.0, 1000.0])
