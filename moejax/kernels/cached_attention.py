"""Grouped-query attention of a sequence's next tokens to all of it, with the keys and values of earlier ones kept.

B batch  T new token  S slot  N query heads  K key/value heads  G query heads per key/value head  H head dim
"""

import jax
import jax.numpy as jnp

from moejax.kernels.attention import MASKED


def cached_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  positions_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """out_BTNH, and k_BSKH and v_BSKH with the new tokens at the slots of their positions.

  Positions rise by 1 along T and stay below S. A token attends to the slots up to its own, so what a slot held before
  its token comes is never seen. Takes one device's share of batch and heads. Softmax in float32.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  write = jax.vmap(lambda kept, new, start: jax.lax.dynamic_update_slice_in_dim(kept, new, start, axis=0))
  k_BSKH = write(k_BSKH, k_BTKH.astype(k_BSKH.dtype), positions_BT[:, 0])
  v_BSKH = write(v_BSKH, v_BTKH.astype(v_BSKH.dtype), positions_BT[:, 0])
  q_BTKGH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H)
  logits_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  seen_BTS = jnp.arange(S)[None, None, :] <= positions_BT[:, :, None]
  logits_BKGTS = jnp.where(seen_BTS[:, None, None], logits_BKGTS, MASKED)
  probs_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype)
  out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH)
  return out_BTKGH.reshape(B, T, N, H), k_BSKH, v_BSKH
