"""Grouped-query attention of new tokens to a KV cache.

B batch  T query position  S key position  N query heads  K key/value heads
G query heads per key/value head  H head dim
"""

import jax
import jax.numpy as jnp

from moejax.kernels.attention import MASKED


def store(kept_BSKH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
  """Returns kept_BSKH with the keys or values of new tokens at the slots of their positions, which rise by 1 along T
  and are below S."""
  write = jax.vmap(lambda kept, new, start: jax.lax.dynamic_update_slice_in_dim(kept, new, start, axis=0))
  return write(kept_BSKH, new_BTKH.astype(kept_BSKH.dtype), positions_BT[:, 0])


def cached_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
  """Returns out_BTNH of new tokens, whose keys and values are already stored at the slots of their positions.

  A token attends to the slots up to its own, so that unused slots have no effect. Takes the shard of one device. The
  softmax is in float32.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  q_BTKGH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H)
  logits_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  seen_BTS = jnp.arange(S)[None, None, :] <= positions_BT[:, :, None]
  logits_BKGTS = jnp.where(seen_BTS[:, None, None], logits_BKGTS, MASKED)
  probs_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype)
  out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH)
  return out_BTKGH.reshape(B, T, N, H)
