"""What is kept for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models.remat import keep, of_kept


@pytest.mark.parametrize(
  ("through", "roundings"), [(of_kept, 0), (lambda products, value: lambda x, w: products(keep(x, value), w), 1)]
)
def test_products_of_what_is_kept_take_it_as_it_is_and_only_their_backward_pass_has_the_copy(through, roundings):
  x, w, y = jax.random.normal(jax.random.key(0), (3, 4, 4))

  def loss(x, w):
    return jnp.sum(through(jnp.matmul, "expert_rows")(jnp.sin(x), w) * y)

  policy = jax.checkpoint_policies.save_only_these_names("expert_rows")
  gradient = jax.grad(jax.checkpoint(loss, policy=policy, prevent_cse=False), argnums=(0, 1))
  program = str(jax.make_jaxpr(gradient)(x, w))
  assert program.count("= sin ") == 1, "kept, and not computed again"
  assert program.count("= reduce_precision") == roundings
  of_x, of_w = gradient(x, w)
  np.testing.assert_allclose(of_x, jnp.cos(x) * (y @ w.T), rtol=1e-5)
  np.testing.assert_allclose(of_w, jnp.sin(x).T @ y, rtol=1e-5)
