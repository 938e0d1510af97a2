"""Attention with kept keys and values against attention over the whole sequence."""

import jax
import numpy as np
import pytest

from moejax.kernels.attention import attention
from moejax.kernels.cached_attention import cached_attention, store


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


run = jax.jit(attention)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_pieces_of_a_sequence_attend_as_the_whole_does_whatever_the_slots_held_before(kv_heads):
  q, k, v = draw(0, 2, 9, 4, 8), draw(1, 2, 9, kv_heads, 8), draw(2, 2, 9, kv_heads, 8)
  expected = run(q, k, v, np.ones((2, 9), int))
  kept = (100 * draw(3, 2, 12, kv_heads, 8), 100 * draw(4, 2, 12, kv_heads, 8))
  pieces, all_of_them = [], 2**31 - 1  # a window and a chunk without effect

  @jax.jit
  def step(kept, q, k, v, positions_BT):
    kept = [store(old, new, positions_BT) for old, new in zip(kept, (k, v), strict=True)]
    return cached_attention(q, *kept, positions_BT, all_of_them, all_of_them), kept

  for start, end in ((0, 4), (4, 5), (5, 9)):
    positions_BT = np.broadcast_to(np.arange(start, end), (2, end - start))
    piece, kept = step(kept, *(each[:, start:end] for each in (q, k, v)), positions_BT)
    pieces.append(piece)
  np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=1e-5)
  np.testing.assert_array_equal(np.asarray(kept[0])[:, :9], k)


def test_rows_stand_at_different_positions():
  q, k, v = draw(0, 2, 6, 2, 8), draw(1, 2, 6, 2, 8), draw(2, 2, 6, 2, 8)
  expected = np.asarray(run(q, k, v, np.ones((2, 6), int)))
  kept_k, kept_v = k.copy(), v.copy()
  for kept in (kept_k, kept_v):
    kept[:, 5], kept[0, 2:] = 7.0, 9.0
  at = np.array([2, 5])

  @jax.jit
  def step(q, k, v, kept_k, kept_v, at):
    one = jax.vmap(lambda x, i: x[i][None])
    kept = [store(old, one(new, at), at[:, None]) for old, new in ((kept_k, k), (kept_v, v))]
    return cached_attention(one(q, at), *kept, at[:, None])

  out = np.asarray(step(q, k, v, kept_k, kept_v, at))
  np.testing.assert_allclose(out[:, 0], np.stack([expected[0, 2], expected[1, 5]]), atol=1e-5)
