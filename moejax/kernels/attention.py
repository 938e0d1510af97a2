"""Causal grouped-query attention within documents.

B batch  T query position  S key position  N query heads  K key/value heads  G query heads per key/value head  H head
Z = B x K  Q = G x T
"""

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Logit of a masked pair: finite, so that a padded row, which sees nothing, has no NaN."""


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
  """out_BTNH: each position attends to itself and to earlier positions of its own document.

  Takes one device's share of batch and heads. Softmax in float32. Batch and heads are one leading dimension and each
  product leaves its result in its natural order: on CPU that takes about 0.75 times einsums over [B, T, K, G, H].
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  G = N // K
  mask_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & jnp.tril(jnp.ones((1, T, S), bool))
  q_ZQH = (q_BTNH * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * K, G * T, H)
  k_ZSH = k_BSKH.swapaxes(1, 2).reshape(B * K, S, H)
  v_ZSH = v_BSKH.swapaxes(1, 2).reshape(B * K, S, H)
  logits_ZQS = jnp.einsum("ZQH,ZSH->ZQS", q_ZQH, k_ZSH, preferred_element_type=jnp.float32)
  logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_ZQS.reshape(B, K, G, T, S), MASKED)
  probs_ZQS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype).reshape(B * K, G * T, S)
  out_ZQH = jnp.einsum("ZQS,ZSH->ZQH", probs_ZQS, v_ZSH)
  return out_ZQH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
