"""Causal grouped-query attention within documents.

B batch  T query position  S key position  N query heads  K key/value heads  G query heads per key/value head
H head dim  X = B x K  Y = G x T
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash

MASKED = -1e30
"""Logit of a masked pair. It is finite, so that a padded row, which attends to nothing, has no NaN."""

ATTENTION = "attention"
"""Name of the values that attention may save for the backward pass (`jax.checkpoint`)."""

LANES = 128
"""Width of the vector unit of a TPU. The fused kernel needs a sequence length that is a multiple of it."""

LARGEST_BLOCK = 1024
"""Largest block of the fused kernel, in positions, for heads of at most LANES dimensions. The backward pass of larger
blocks does not fit in VMEM. Blocks of wider heads are shorter by the same factor."""

Attention = Callable[..., jax.Array]
"""attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, window) to out_BTNH, on one device's share of batch and heads."""


def attention_for(platform: str, sequence_length: int, sinks: bool = False) -> Attention:
  """The fastest implementation for a platform: a fused kernel on TPU, which keeps the scores out of HBM. It has no
  sinks."""
  fused = platform == "tpu" and sequence_length % LANES == 0 and not sinks
  return fused_attention if fused else attention


def fused_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array,
  window: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """`attention` by the splash attention kernel of JAX, which skips the blocks above the diagonal and before the window.

  `interpret` runs the kernel without a TPU.
  """
  T, N, H = q_BTNH.shape[1:]
  largest = max(LANES, LARGEST_BLOCK * LANES // max(LANES, H))
  block = max(size for size in range(LANES, largest + 1, LANES) if T % size == 0)
  seen = splash.CausalMask((T, T)) if window is None else splash.LocalMask((T, T), (window - 1, 0), 0)
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([seen] * N),
    # The backward pass is two kernels. A fused one saves two of seven products, but loses that time in summing dq.
    block_sizes=splash.BlockSizes(
      block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    ),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=ATTENTION,
    interpret=interpret,
  )
  q_BNTH = (q_BTNH * H**-0.5).swapaxes(1, 2)
  segments = splash.SegmentIds(segments_BT, segments_BT)
  return jax.vmap(kernel)(q_BNTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), segments).swapaxes(1, 2)


def heads_served(x_BSKH: jax.Array, first: jax.Array, queries: int, group: int) -> jax.Array:
  """Selects the keys or values that the query heads of a device attend to.

  Args:
    x_BSKH: the keys or values on the device, which may also serve the query heads of other devices.
    first: the first query head of the device, counted from the first that x_BSKH serves.
    queries: number of query heads of the device.
    group: number of consecutive query heads that one key/value head serves (G).
  """
  if queries == group * x_BSKH.shape[2]:
    return x_BSKH
  if queries % group == 0 or group % queries == 0:
    return jax.lax.dynamic_slice_in_dim(x_BSKH, first // group, max(1, queries // group), axis=2)
  # The query heads of the device begin or end within a group, so each gets a copy of its keys or values.
  return jnp.take(x_BSKH, (first + jnp.arange(queries)) // group, axis=2)


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array,
  window: int | None = None,
  sinks_N: jax.Array | None = None,
  segments_BS: jax.Array | None = None,
  first: int | jax.Array = 0,
) -> jax.Array:
  """Returns out_BTNH. Each position attends to itself and to earlier positions of its document.

  Takes the shard of one device. The softmax is in float32. Batch and key/value heads are one leading dimension, which
  on CPU takes about 0.75 times as long as einsums over [B, T, K, G, H].

  Args:
    q_BTNH: queries.
    k_BSKH: keys.
    v_BSKH: values, whose heads may have another dimension.
    segments_BT: number of the document of each query position.
    window: number of positions that a position attends to, itself included. None: all.
    sinks_N: additional logits of the softmax, which have no value.
    segments_BS: number of the document of each key position. None: queries and keys have the same positions.
    first: the key position of the first query.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  G = N // K
  of_keys_BS = segments_BT if segments_BS is None else segments_BS
  behind_1TS = first + jnp.arange(T)[None, :, None] - jnp.arange(S)[None, None, :]
  mask_BTS = (segments_BT[:, :, None] == of_keys_BS[:, None, :]) & (behind_1TS >= 0)
  if window is not None:
    mask_BTS &= behind_1TS < window
  q_XYH = (q_BTNH * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * K, G * T, H)
  k_XSH = k_BSKH.swapaxes(1, 2).reshape(B * K, S, H)
  v_XSH = v_BSKH.swapaxes(1, 2).reshape(B * K, S, -1)
  logits_XYS = jnp.einsum("XYH,XSH->XYS", q_XYH, k_XSH, preferred_element_type=jnp.float32)
  logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_XYS.reshape(B, K, G, T, S), MASKED)
  probs_XYS = softmax_with_sinks(logits_BKGTS, sinks_N).astype(v_BSKH.dtype).reshape(B * K, G * T, S)
  out_XYH = jnp.einsum("XYS,XSH->XYH", probs_XYS, v_XSH)
  out_BTNH = out_XYH.reshape(B, K, G, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
  return checkpoint_name(out_BTNH, ATTENTION)


def softmax_with_sinks(logits_BKGTS: jax.Array, sinks_N: jax.Array | None) -> jax.Array:
  """The softmax over S and, if there are sinks, over the additional logit of each head, whose probability is left
  out."""
  if sinks_N is None:
    return jax.nn.softmax(logits_BKGTS, axis=-1)
  B, K, G, T, S = logits_BKGTS.shape
  sinks_BKGT1 = jnp.broadcast_to(sinks_N.astype(logits_BKGTS.dtype).reshape(1, K, G, 1, 1), (B, K, G, T, 1))
  return jax.nn.softmax(jnp.concatenate([logits_BKGTS, sinks_BKGT1], axis=-1), axis=-1)[..., :S]
