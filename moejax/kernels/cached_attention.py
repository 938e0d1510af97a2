"""Grouped-query attention of new tokens to a KV cache.

B batch  T query position  S key position  N query heads  K key/value heads
G query heads per key/value head  H head dim
"""

import jax
import jax.numpy as jnp

from moejax.kernels.attention import MASKED, softmax_with_sinks


def store(kept_BSKH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
  """Returns kept_BSKH with the keys or values of new tokens at the slots of their positions, which rise by 1 along T
  and are below S."""
  write = jax.vmap(lambda kept, new, start: jax.lax.dynamic_update_slice_in_dim(kept, new, start, axis=0))
  return write(kept_BSKH, new_BTKH.astype(kept_BSKH.dtype), positions_BT[:, 0])


def cached_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  positions_BT: jax.Array,
  window: int | None = None,
  chunk: int | None = None,
  sinks_N: jax.Array | None = None,
) -> jax.Array:
  """Returns out_BTNH of new tokens, whose keys and values are already stored at the slots of their positions.

  A token attends to the slots up to its own, so that unused slots have no effect. Takes the shard of one device. The
  softmax is in float32. `window` and `sinks_N` are as in `attention`. With `chunk`, positions attend only to those of
  their own chunk.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  q_BTKGH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H)
  logits_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  slots_11S, own_BT1 = jnp.arange(S)[None, None, :], positions_BT[:, :, None]
  seen_BTS = slots_11S <= own_BT1
  if window is not None:
    seen_BTS &= slots_11S > own_BT1 - window
  if chunk is not None:
    seen_BTS &= slots_11S // chunk == own_BT1 // chunk
  logits_BKGTS = jnp.where(seen_BTS[:, None, None], logits_BKGTS, MASKED)
  probs_BKGTS = softmax_with_sinks(logits_BKGTS, sinks_N).astype(v_BSKH.dtype)
  out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH)
  return out_BTKGH.reshape(B, T, N, -1)
