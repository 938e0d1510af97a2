"""Causal grouped-query attention within documents.

B batch  T query position  S key position  N query heads  K key/value heads  G query heads per key/value head
H head dim  X = B x K  Y = G x T
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from moejax.kernels.attention_gpu import fits, triton_attention

MASKED = -1e30
"""Logit of a masked pair. It is finite, so that a padded row, which attends to nothing, has no NaN."""

CONTEXT = "context"
"""Name of the values that attention may save for the backward pass (`jax.checkpoint`)."""

LANES = 128
"""Width of the vector unit of a TPU. The fused kernel needs a sequence length that is a multiple of it."""

LARGEST_BLOCK = 1024
"""Largest block of the fused kernel, in positions, for heads of at most LANES dimensions. The backward pass of larger
blocks does not fit in VMEM. Blocks of wider heads are shorter by the same factor."""

STEP_SCORES = 100_000
"""Scores that take as long as the fixed time of one block: 0.33 us on v5e (JAX's guide to matrix multiplication in
Pallas on TPU: 262,144 products of 128 x 128 x 128 take 92 ms), in which the kernels compute 70,000 (v5e) to 150,000
(v5p) scores."""

SCORES = "scores_"
"""Prefix of a scope around the fused kernel on one part of the sequence. The number after it counts the scores that the
kernel computes for a head of a sequence, on the device with the most. Plans read it, since operand shapes do not tell
it."""

Attention = Callable[..., jax.Array]
"""attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, window) to out_BTNH, on one device's share of batch and heads. Where
there are sinks, `sinks_N` is a further argument."""


def attention_for(platform: str, q_BTNH: jax.Array, v_BSKH: jax.Array, parts: int = 1) -> Attention:
  """The fastest implementation for a platform, and for queries and values of these shapes and types: a fused kernel on
  TPU and GPU, which keeps the scores out of HBM.

  On TPU, it needs a sequence of whole blocks or, if devices have `parts` of the sequence, parts whose halves are whole
  blocks. On GPU, it takes heads of up to 256 dimensions, or up to 128 in float32, and whole sequences. Anything else is
  plain attention.
  """
  whole = q_BTNH.shape[1] % (LANES * (2 * parts if parts > 1 else 1)) == 0
  if platform == "tpu" and whole:
    return fused_attention
  if platform == "gpu" and parts == 1 and fits(q_BTNH.dtype, (q_BTNH.shape[-1], v_BSKH.shape[-1])):
    return fused_attention_gpu
  return attention


def fused_attention_gpu(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array,
  window: int | None = None,
  sinks_N: jax.Array | None = None,
  interpret: bool = False,
) -> jax.Array:
  """`attention` of tokens that attend to each other, by the Triton kernels of `moejax.kernels.attention_gpu`.

  `interpret` runs the kernels without a GPU.
  """
  return triton_attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, window, sinks_N, CONTEXT, interpret)


def fused_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array,
  window: int | None = None,
  sinks_N: jax.Array | None = None,
  segments_BS: jax.Array | None = None,
  part: int | jax.Array = 0,
  interpret: bool = False,
) -> jax.Array:
  """`attention` by the splash attention kernel of JAX, which skips the blocks above the diagonal and before the window.

  The kernel reads which blocks to compute from arrays. For a part of the queries, these are the rows of that part, so
  that one program serves all devices. The device with the most blocks determines the size of the grid; the others skip
  the rest of it.

  Args:
    q_BTNH: queries. If they are a part of the sequence, they have the positions of `query_order`.
    k_BSKH: keys.
    v_BSKH: values.
    segments_BT: number of the document of each query position.
    window: as in `attention`.
    sinks_N: as in `attention`. They are rounded to the type of the queries, which their gradient has in the kernel.
    segments_BS: number of the document of each key position. None: queries and keys have the same positions.
    part: the number of the part, of S / T.
    interpret: whether the kernel runs without a TPU.
  """
  (T, N, H), S = q_BTNH.shape[1:], k_BSKH.shape[1]
  parts = S // T
  block = block_size(T, parts, window, H)
  seen = splash.CausalMask((S, S)) if window is None else splash.LocalMask((S, S), (window - 1, 0), 0)
  seen.q_sequence = order_S = query_order(S, parts, window)
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([seen] * N),
    # The backward pass is two kernels. A fused one saves two of seven products, but loses that time in summing dq.
    block_sizes=splash.BlockSizes(
      block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    ),
    head_shards=1,
    q_seq_shards=parts,
    residual_checkpoint_name=CONTEXT,
    interpret=interpret,
  )
  of_keys_BS = segments_BT if segments_BS is None else segments_BS
  arguments = (
    (q_BTNH * H**-0.5).swapaxes(1, 2), k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2),
    splash.SegmentIds(segments_BT, of_keys_BS), None if sinks_N is None else sinks_N.astype(q_BTNH.dtype),
  )  # fmt: skip
  axes = (0, 0, 0, 0, None)
  if parts == 1:
    return jax.vmap(kernel, axes)(*arguments).swapaxes(1, 2)

  def own(x: jax.Array) -> jax.Array:
    """The rows of this part of an array [1, blocks, width] of the kernel, or of the positions [S]."""
    axis = 1 if x.ndim == 3 else 0
    size = x.shape[axis] // parts
    return jax.lax.dynamic_slice_in_dim(x, part * size, size, axis)

  with jax.named_scope(f"{SCORES}{_most_scores(order_S, block, parts, window)}"):
    return jax.vmap(jax.tree.map(own, kernel), axes)(*arguments).swapaxes(1, 2)


def block_size(length: int, parts: int, window: int | None, H: int) -> int:
  """The positions of a block of the fused kernel for a part of `length` queries with heads of H dimensions.

  Without a window, the largest that divides the part. A window touches parts of the blocks at its ends, so that small
  blocks have fewer masked scores but more often the fixed time of a block: the size is that of the least time.
  """
  largest = max(LANES, LARGEST_BLOCK * LANES // max(LANES, H))
  consecutive = length // 2 if is_folded(parts, window) else length
  sizes = [size for size in range(LANES, largest + 1, LANES) if consecutive % size == 0]
  if window is None:
    return max(sizes)
  order_S = query_order(length * parts, parts, window)

  def time(size: int) -> float:
    return _most_scores(order_S, size, parts, window) * (1 + STEP_SCORES / size**2)

  return min(sizes, key=time)


def is_folded(parts: int, window: int | None) -> bool:
  """Whether each device attends with an early and a late part of the sequence. With a window, parts have equal work."""
  return parts > 1 and window is None


def parts_before(length: int, parts: int, window: int | None) -> int | None:
  """The number of parts before its own whose keys a part of `length` queries gets. None: it gathers those of all parts.

  Passing n parts on from device to device takes the time of n parts. A gather uses both directions of a ring, and takes
  that of (parts - 1) / 2.
  """
  needed = parts if window is None else -(-(window - 1) // length)
  return needed if 2 * needed < parts else None


def query_order(length: int, parts: int, window: int | None) -> np.ndarray:
  """The positions of the queries of all parts, one part after the other.

  Causal attention of consecutive queries in the last part sees 2 - 1 / parts times the average number of keys. Folded,
  there are 2 * parts halves, of which part i has the i-th and the i-th from the end, the even one first, which together
  see the average (as in Llama 3, arXiv 2407.21783, section 3.3.2).
  """
  positions = np.arange(length, dtype=np.int32)
  if not is_folded(parts, window):
    return positions
  halves = [(i, 2 * parts - 1 - i) if i % 2 == 0 else (2 * parts - 1 - i, i) for i in range(parts)]
  return positions.reshape(2 * parts, -1)[np.array(halves).reshape(-1)].reshape(-1)


def _most_scores(order_S: np.ndarray, block: int, parts: int, window: int | None) -> int:
  """The number of scores in the blocks that the part with the most of them sees."""
  blocks = order_S.reshape(parts, -1, block)
  first = 0 if window is None else np.maximum(0, blocks[..., 0] - window + 1) // block
  return int((blocks[..., 0] // block - first + 1).sum(axis=1).max()) * block**2


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
  return checkpoint_name(out_BTNH, CONTEXT)


def softmax_with_sinks(logits_BKGTS: jax.Array, sinks_N: jax.Array | None) -> jax.Array:
  """The softmax over S and, if there are sinks, over the additional logit of each head, whose probability is left
  out."""
  if sinks_N is None:
    return jax.nn.softmax(logits_BKGTS, axis=-1)
  B, K, G, T, S = logits_BKGTS.shape
  sinks_BKGT1 = jnp.broadcast_to(sinks_N.astype(logits_BKGTS.dtype).reshape(1, K, G, 1, 1), (B, K, G, T, 1))
  return jax.nn.softmax(jnp.concatenate([logits_BKGTS, sinks_BKGT1], axis=-1), axis=-1)[..., :S]
