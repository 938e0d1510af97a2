"""Attention with kept keys and values against attention over the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.attention import attention
from moejax.kernels.cached_attention import cached_attention, store


def draw(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_pieces_of_a_sequence_attend_as_the_whole_does_whatever_the_slots_held_before(kv_heads):
  q, k, v = draw(0, 2, 9, 4, 8), draw(1, 2, 9, kv_heads, 8), draw(2, 2, 9, kv_heads, 8)
  expected = attention(q, k, v, jnp.ones((2, 9), int))
  kept = (100 * draw(3, 2, 12, kv_heads, 8), 100 * draw(4, 2, 12, kv_heads, 8))
  pieces, all_of_them = [], 2**31 - 1  # a window and a chunk without effect
  for start, end in ((0, 4), (4, 5), (5, 9)):
    positions_BT = jnp.broadcast_to(jnp.arange(start, end), (2, end - start))
    kept = [store(old, new[:, start:end], positions_BT) for old, new in zip(kept, (k, v), strict=True)]
    pieces.append(cached_attention(q[:, start:end], *kept, positions_BT, all_of_them, all_of_them))
  np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), expected, atol=1e-5)
  np.testing.assert_array_equal(kept[0][:, :9], k)


def test_rows_stand_at_different_positions():
  q, k, v = draw(0, 2, 6, 2, 8), draw(1, 2, 6, 2, 8), draw(2, 2, 6, 2, 8)
  expected = attention(q, k, v, jnp.ones((2, 6), int))
  kept_k, kept_v = k.at[:, 5].set(7.0).at[0, 2:].set(9.0), v.at[:, 5].set(7.0).at[0, 2:].set(9.0)
  at = jnp.array([2, 5])
  one = jax.vmap(lambda x, i: x[i][None])
  kept = [store(old, one(new, at), at[:, None]) for old, new in ((kept_k, k), (kept_v, v))]
  out = cached_attention(one(q, at), *kept, at[:, None])
  np.testing.assert_allclose(out[:, 0], jnp.stack([expected[0, 2], expected[1, 5]]), atol=1e-5)
