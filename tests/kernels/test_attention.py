"""The attention kernel against loops, for grouped heads, documents and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.attention import (
  _most_scores,
  attention,
  attention_for,
  block_size,
  fused_attention,
  fused_attention_gpu,
  parts_before,
  query_order,
)


def reference(q_BTNH, k_BSKH, v_BSKH, segments_BT):
  """Position by position, head by head."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  out = np.zeros((B, T, N, H))
  for b in range(B):
    for t in range(T):
      seen = [s for s in range(t + 1) if segments_BT[b, s] == segments_BT[b, t]]
      for n in range(N):
        logits = np.array([q_BTNH[b, t, n] @ k_BSKH[b, s, n // (N // K)] / np.sqrt(H) for s in seen])
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        out[b, t, n] = sum(w * v_BSKH[b, s, n // (N // K)] for w, s in zip(weights, seen, strict=True))
  return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_loops_over_positions_and_heads(kv_heads):
  random = np.random.default_rng(0)
  q_BTNH = random.normal(size=(2, 7, 4, 6)).astype(np.float32)
  k_BSKH, v_BSKH = random.normal(size=(2, 2, 7, kv_heads, 6)).astype(np.float32)
  segments_BT = np.array([[1, 1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 1, 0, 0]])
  out_BTNH = jax.jit(attention)(q_BTNH, k_BSKH, v_BSKH, segments_BT)
  np.testing.assert_allclose(out_BTNH, reference(q_BTNH, k_BSKH, v_BSKH, segments_BT), atol=1e-5)


def test_gradients_equal_those_of_the_library_on_one_document():
  q, k, v, weight = jax.random.normal(jax.random.key(0), (4, 2, 9, 4, 8))

  def ours(q, k, v):
    return jnp.sum(attention(q, k, v, jnp.ones((2, 9), jnp.int32)) * weight)

  def theirs(q, k, v):
    return jnp.sum(jax.nn.dot_product_attention(q, k, v, is_causal=True) * weight)

  for mine, other in zip(*(jax.jit(jax.grad(of, (0, 1, 2)))(q, k, v) for of in (ours, theirs)), strict=True):
    np.testing.assert_allclose(mine, other, atol=1e-5)


TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}
"""Of the norm of a difference, relative to the norm. bfloat16 has 8 bits of precision."""


@pytest.mark.parametrize(
  ("window", "sinks", "dtype"),
  [
    (None, False, "float32"),
    (40, True, "float32"),
    pytest.param(None, True, "bfloat16", marks=pytest.mark.slow),
  ],
)
def test_the_fused_kernel_equals_the_plain_one_with_gradients_for_grouped_heads_documents_sinks_and_padding(
  window, sinks, dtype
):
  keys = jax.random.split(jax.random.key(0), 5)
  q, weight = (jax.random.normal(key, (2, 256, 4, 16)) for key in keys[:2])
  k, v = (jax.random.normal(key, (2, 256, 2, 16)) for key in keys[2:4])
  sinks_N = 2 * jax.random.normal(keys[4], (4,)) if sinks else None
  # Documents that end inside a block and at its border; the second sequence ends in padding.
  segments = jnp.asarray(np.repeat([[1, 1, 1, 2, 2, 2, 2, 3], [1, 2, 2, 2, 3, 3, 0, 0]], 32, axis=1))
  weight = weight * (segments > 0)[..., None, None]

  def results(attend, *arguments):
    def weighted(q, k, v, sinks_N):
      out_BTNH = attend(q, k, v, segments, window, sinks_N)
      return jnp.sum(out_BTNH * weight), out_BTNH * (segments > 0)[..., None, None]

    differentiated = (0, 1, 2, 3) if sinks else (0, 1, 2)
    (_, out_BTNH), gradients = jax.value_and_grad(weighted, differentiated, has_aux=True)(*arguments)
    return out_BTNH, *gradients

  run = jax.jit(results, static_argnums=0)
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  found = run(functools.partial(fused_attention, interpret=True), q, k, v, sinks_N)
  expected = run(attention, *(x.astype(jnp.float32) for x in (q, k, v)), sinks_N)
  for mine, other, like in zip(found, expected, (q, q, k, v, sinks_N), strict=False):
    assert mine.dtype == like.dtype and mine.shape == other.shape
    # The terms of the gradient of a sink cancel.
    limit = TOLERANCE[dtype] * (3 if mine.ndim == 1 else 1)
    assert np.linalg.norm(np.asarray(mine, np.float64) - np.asarray(other)) < limit * np.linalg.norm(other)


@pytest.mark.parametrize(
  ("platform", "length", "head_dims", "dtype", "chosen"),
  [
    ("tpu", 4096, (128, 128), "bfloat16", fused_attention),
    ("tpu", 4096, (64, 64), "bfloat16", fused_attention),
    ("tpu", 4100, (128, 128), "bfloat16", attention),
    ("gpu", 4100, (128, 128), "bfloat16", fused_attention_gpu),
    ("gpu", 4096, (192, 128), "float16", fused_attention_gpu),
    ("gpu", 4096, (128, 128), "float32", fused_attention_gpu),
    ("gpu", 4096, (128, 192), "float32", attention),
    ("gpu", 4096, (320, 320), "bfloat16", attention),
    ("gpu", 4096, (128, 128), "float64", attention),
    ("cpu", 4096, (128, 128), "float32", attention),
  ],
)
def test_the_kernel_is_chosen_by_the_platform_the_shapes_and_the_type(platform, length, head_dims, dtype, chosen):
  q_BTNH, v_BSKH = (jax.ShapeDtypeStruct((1, length, 4, width), np.dtype(dtype)) for width in head_dims)
  assert attention_for(platform, q_BTNH, v_BSKH) is chosen


@pytest.mark.parametrize(("length", "chosen"), [(2048, fused_attention), (2048 + 128 * 8, attention)])
def test_a_part_of_the_sequence_has_the_fused_kernel_if_its_halves_are_whole_blocks(length, chosen):
  q_BTNH = jax.ShapeDtypeStruct((1, length, 4, 128), jnp.bfloat16)
  assert attention_for("tpu", q_BTNH, q_BTNH, parts=8) is chosen
  assert attention_for("gpu", q_BTNH, q_BTNH, parts=8) is attention


@pytest.mark.parametrize(
  ("window", "before"), [(None, None), (1, 0), (2, 1), (17, 1), (18, 2), (49, 3), (50, None), (200, None)]
)
def test_a_window_needs_the_keys_of_few_parts_until_gathering_all_takes_less_time(window, before):
  assert parts_before(16, 8, window) == before  # three parts one way, or seven in two directions


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_without_a_window_all_parts_see_equally_many_keys_and_consecutive_ones_up_to_twice_the_average(parts):
  length = 48 * parts
  order = query_order(length, parts, None)
  assert sorted(order) == list(range(length))
  seen = (order + 1).reshape(parts, -1).sum(axis=1)
  assert set(seen) == {length * (length + 1) // 2 // parts}
  assert (query_order(length, parts, 7) == np.arange(length)).all()
  last = np.arange(length)[-48:] + 1
  assert last.mean() / np.mean(order + 1) == pytest.approx(2 - 1 / parts, rel=0.02)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3, 9, 20])
def test_the_counted_scores_are_those_of_the_blocks_that_the_part_with_the_most_sees(parts, window):
  length, block = 64, 4
  order = query_order(length, parts, window)
  behind = order[:, None] - np.arange(length)
  mask = (behind >= 0) & (behind < (window or length))
  blocks = mask.reshape(parts, -1, block, length // block, block).any(axis=(2, 4))
  assert _most_scores(order, block, parts, window) == blocks.sum(axis=(1, 2)).max() * block**2


@pytest.mark.parametrize(
  ("window", "parts", "width", "block"),
  [
    (None, 1, 128, 1024),
    (None, 1, 256, 512),
    (None, 16, 128, 256),  # half a part
    (128, 1, 64, 256),  # gpt-oss
    (512, 1, 256, 512),  # Gemma 3
    (1024, 1, 128, 512),
    (1024, 1, 256, 512),
    (4096, 1, 128, 1024),  # Mistral
    (128, 4, 64, 256),
    (1, 1, 128, 256),
  ],
)
def test_blocks_are_as_large_as_the_kernel_takes_or_smaller_with_a_short_window(window, parts, width, block):
  assert block_size(8192 // parts, parts, window, width) == block


@pytest.mark.parametrize(
  ("window", "before", "after"), [(128, 15 * 1024**2, 63 * 256**2), (1024, 15 * 1024**2, 45 * 512**2)]
)
def test_smaller_blocks_of_a_window_have_fewer_scores(window, before, after):
  """In a sequence of 8192 positions."""
  order = query_order(8192, 1, window)
  assert _most_scores(order, 1024, 1, window) == before
  assert _most_scores(order, block_size(8192, 1, window, 128), 1, window) == after


@pytest.mark.slow
def test_a_window_over_several_blocks_of_the_fused_kernel_equals_the_plain_one_with_gradients():
  window = 128
  q, k, v, weight = jax.random.normal(jax.random.key(0), (4, 1, 1024, 2, 8))
  assert block_size(1024, 1, window, 8) < 1024
  segments_BT = jnp.asarray(np.repeat([1, 2, 3], [600, 300, 124]))[None]

  def gradients(attend):
    total = lambda q, k, v: jnp.sum(attend(q, k, v, segments_BT, window) * weight)  # noqa: E731
    return jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)

  for mine, other in zip(
    gradients(functools.partial(fused_attention, interpret=True)), gradients(attention), strict=True
  ):
    np.testing.assert_allclose(mine, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("window", [None, 10])
def test_a_part_of_the_queries_has_its_rows_of_the_whole(window):
  random = np.random.default_rng(0)
  q_BTNH, k_BSNH, v_BSNH = (np.asarray(random.normal(size=(1, 64, 2, 8)), np.float32) for _ in range(3))
  segments_BT = np.repeat([1, 2, 3], [38, 15, 11])[None]
  run = jax.jit(attention, static_argnames=("window", "first"))
  whole_BTNH = np.asarray(run(q_BTNH, k_BSNH, v_BSNH, segments_BT, window=window))
  for first in (0, 32):
    part = slice(first, first + 32)
    out_BTNH = run(
      q_BTNH[:, part], k_BSNH, v_BSNH, segments_BT[:, part], window=window, segments_BS=segments_BT, first=first
    )
    np.testing.assert_allclose(out_BTNH, whole_BTNH[:, part], atol=2e-5)
