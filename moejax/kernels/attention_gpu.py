"""Causal grouped-query attention within documents on GPU: three Triton kernels, written in Pallas, which keep the
scores out of memory (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).

B batch  T query position  S key position  N query heads  K key/value heads  G query heads per key/value head
H head dim  J other dimension

Values and outputs have heads of J dimensions.

A lower-case letter is the size of one block: t positions of queries, s of keys, and h and j, the widths of blocks for
H and J. Blocks may extend beyond their array, where they hold zeros. Arrays without heads or with one
number for each position are padded to whole blocks.

The softmax has base 2, for which a GPU has an instruction. A sink is the first logit of each sum; without sinks it is
UNSEEN, whose part of the sum is 0 next to any other logit.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

Ref = Any
"""A reference of Pallas to an array in memory, for which JAX has no public type."""

LARGEST_BLOCK, LARGEST_BACKWARD = 128, 64
"""Largest number of positions in a block, in the forward and in the backward pass."""

MOST_BYTES = 512
"""Largest row of a head, after rounding up to a power of two: 256 bfloat16 or 128 float32."""

KEPT, READ, READ_BACKWARD = 32_768, 16_384, 8192
"""Most bytes of a block that a program keeps, and of one that it reads in each iteration of its loop, of which two
stages are in flight. The forward pass keeps queries and reads keys and values: 32 + 2 x (16 + 16) KiB. The backward
pass keeps two blocks and reads two: at most 64 + 2 x (8 + 8) KiB. These 96 KiB, 98,560 bytes with what the compiler
adds, fit in the shared memory of every data-center GPU from Ampere on: a program has 101,376 bytes on A10, L4 and L40S,
166,912 on A100, and 232,448 on H100, H200 and B200.

With heads of 128 bfloat16, the backward pass has the blocks (64 and 32 positions) and warps (4) that are fastest in
tokamax's autotuning data for H100. The forward pass has its queries (128) and warps (8), with 64 keys in two stages
instead of 128 in three, which need 224 KiB."""

LOG2_E = math.log2(math.e)

UNSEEN = -1e30
"""Logit of a pair that is not seen. It is finite, so that differences of logits have no NaN."""


def block_width(head_dim: int) -> int:
  """Columns of a block of heads: `head_dim` rounded up to a power of two, and at least the 16 of an instruction of the
  tensor cores. Triton fills an instruction with copies of narrower operands, whose products it then sums several
  times."""
  return max(16, 1 << (head_dim - 1).bit_length())


def fits(dtype: jnp.dtype, head_dims: tuple[int, ...]) -> bool:
  """Whether the kernels take queries, keys and values of this type and these head dimensions."""
  return dtype in (jnp.bfloat16, jnp.float16, jnp.float32) and _row_bytes(head_dims, dtype) <= MOST_BYTES


def triton_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKJ: jax.Array,
  segments_BT: jax.Array,
  window: int | None,
  sinks_N: jax.Array | None,
  name: str,
  interpret: bool,
) -> jax.Array:
  """Returns out_BTNJ, without computing the blocks of scores above the diagonal and before the window. The scores are
  in float32, of which a GPU computes products of float32 in TF32; their exponentials are rounded to the type of the
  values.

  Args:
    q_BTNH: queries.
    k_BSKH: keys.
    v_BSKJ: values.
    segments_BT: number of the document of each position.
    window: number of positions that a position attends to, itself included. None: all.
    sinks_N: additional logits of the softmax, which have no value.
    name: of the values that are saved for the backward pass (`jax.checkpoint`): the output and statistics.
    interpret: whether the kernels run without a GPU.
  """
  sinks_N = jnp.full(q_BTNH.shape[2], UNSEEN) if sinks_N is None else sinks_N
  return _attention(q_BTNH, k_BSKH, v_BSKJ, sinks_N.astype(jnp.float32), segments_BT, window, name, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKJ: jax.Array,
  sinks_N: jax.Array,
  segments_BT: jax.Array,
  window: int | None,
  name: str,
  interpret: bool,
) -> jax.Array:
  return _forward(q_BTNH, k_BSKH, v_BSKJ, sinks_N, segments_BT, window, name, interpret)[0]


def _forward(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKJ: jax.Array,
  sinks_N: jax.Array,
  segments_BT: jax.Array,
  window: int | None,
  name: str,
  interpret: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Returns out_BTNJ and what the backward pass needs: the arguments, the output, and lse_BNT, the logarithm of each
  sum of exponentials, in base 2."""
  B, T, N, H = q_BTNH.shape
  K, J = v_BSKJ.shape[2:]
  G, h, j = N // K, block_width(H), block_width(J)
  padded, segments_BT = _padded(T), _whole_blocks(segments_BT)
  row = _row_bytes((H, J), q_BTNH.dtype)
  t, s = (min(size // row, _largest_block(T)) for size in (KEPT, READ))
  last = pl.cdiv(T, t) - 1
  # Programs start in this order, and those of the last queries, which see most keys, take longest.
  of_queries = lambda i, n, b: (b, last - i, n, 0)  # noqa: E731
  of_keys = lambda i, n, b: (b, 0, n // G, 0)  # noqa: E731
  out_BTNJ, lse_BNT = pl.pallas_call(
    functools.partial(_forward_kernel, T=T, H=H, J=J, s=s, window=window),
    grid=(last + 1, N, B),
    in_specs=[
      pl.BlockSpec((N,), lambda i, n, b: (0,)),
      pl.BlockSpec((None, padded), lambda i, n, b: (b, 0)),
      pl.BlockSpec((None, t, None, h), of_queries),
      pl.BlockSpec((None, padded, None, h), of_keys),
      pl.BlockSpec((None, padded, None, j), of_keys),
    ],
    out_specs=[
      pl.BlockSpec((None, t, None, j), of_queries),
      pl.BlockSpec((None, None, t), lambda i, n, b: (b, n, last - i)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((B, T, N, J), q_BTNH.dtype),
      jax.ShapeDtypeStruct((B, N, padded), jnp.float32),
    ],
    compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
    interpret=interpret,
    name=_name("fwd", window),
  )(sinks_N, segments_BT, q_BTNH, k_BSKH, v_BSKJ)
  out_BTNJ, lse_BNT = checkpoint_name(out_BTNJ, name), checkpoint_name(lse_BNT, name)
  return out_BTNJ, (q_BTNH, k_BSKH, v_BSKJ, sinks_N, segments_BT, out_BTNJ, lse_BNT)


def _forward_kernel(
  sinks_N: Ref,
  segments_S: Ref,
  q_th: Ref,
  k_Sh: Ref,
  v_Sj: Ref,
  out_tj: Ref,
  lse_t: Ref,
  *,
  T: int,
  H: int,
  J: int,
  s: int,
  window: int | None,
) -> None:
  """Computes one block of queries of one head, over the blocks of keys that it sees."""
  t, h = q_th.shape
  start = pl.num_programs(0) * t - t - pl.program_id(0) * t
  queries_t = start + jnp.arange(t, dtype=jnp.int32)
  segments_t = segments_S[pl.ds(start, t)]
  own_q_th = _load(q_th, _inside(queries_t, T), _inside(jnp.arange(h), H))

  def add(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    out_tj, sum_t, max_t = carry
    of_block, keys_s = pl.ds(i * s, s), i * s + jnp.arange(s, dtype=jnp.int32)
    k_sh = _load(k_Sh.at[of_block], _inside(keys_s, T), _inside(jnp.arange(h), H))
    v_sj = _load(v_Sj.at[of_block], _inside(keys_s, T), _inside(jnp.arange(v_Sj.shape[1]), J))
    seen_ts = _seen(queries_t[:, None], keys_s[None, :], window)
    seen_ts &= segments_t[:, None] == segments_S[of_block][None, :]
    logits_ts = jnp.where(seen_ts, plgpu.dot(own_q_th, k_sh, trans_b=True) * (H**-0.5 * LOG2_E), UNSEEN)
    new_max_t = jnp.maximum(max_t, jnp.max(logits_ts, axis=1))
    # A row that has seen nothing sums ones, which the first logit that it sees multiplies by 0.
    probs_ts, old_t = jnp.exp2(logits_ts - new_max_t[:, None]), jnp.exp2(max_t - new_max_t)
    out_tj = out_tj * old_t[:, None] + plgpu.dot(probs_ts.astype(v_sj.dtype), v_sj)
    return out_tj, sum_t * old_t + jnp.sum(probs_ts, axis=1), new_max_t

  sink_t = jnp.zeros(t, jnp.float32) + jnp.maximum(sinks_N[pl.program_id(1)] * LOG2_E, UNSEEN)
  nothing = jnp.zeros(out_tj.shape, jnp.float32), jnp.ones(t, jnp.float32), sink_t
  sum_tj, sum_t, max_t = jax.lax.fori_loop(_first_key(start, s, window), _end_of_keys(start + t, s, T), add, nothing)
  lse_t[...] = max_t + jnp.log2(sum_t)
  out = (sum_tj / sum_t[:, None]).astype(out_tj.dtype)
  _store(out_tj, out, _inside(queries_t, T), _inside(jnp.arange(out_tj.shape[1]), J))


def _backward(
  window: int | None, name: str, interpret: bool, kept: tuple[jax.Array, ...], of_out_BTNJ: jax.Array
) -> tuple[jax.Array | None, ...]:
  """Gradients of the queries, keys, values and sinks. Those of keys and values are summed over the heads that they
  serve by the program of their block, and each kernel computes the scores again."""
  q_BTNH, k_BSKH, v_BSKJ, sinks_N, segments_BT, out_BTNJ, lse_BNT = kept
  B, T, N, H = q_BTNH.shape
  K, J = v_BSKJ.shape[2:]
  G, h, j, padded = N // K, block_width(H), block_width(J), _padded(T)
  # The mean over keys of the gradients of each position's probabilities (D in algorithm 2).
  mean_BTN = jnp.sum(out_BTNJ.astype(jnp.float32) * of_out_BTNJ.astype(jnp.float32), axis=-1)
  mean_BNT = _whole_blocks(mean_BTN.swapaxes(1, 2))
  of_sinks_BNT = -jnp.exp2(sinks_N[None, :, None] * LOG2_E - lse_BNT) * mean_BNT
  row = _row_bytes((H, J), q_BTNH.dtype)
  rows, read = (min(size // row, _largest_block(T), LARGEST_BACKWARD) for size in (KEPT, READ_BACKWARD))
  inputs = (segments_BT, q_BTNH, k_BSKH, v_BSKJ, of_out_BTNJ.astype(v_BSKJ.dtype), lse_BNT, mean_BNT)
  # Sums of longer rows do not fit in the registers of 4 warps.
  parameters = plgpu.CompilerParams(num_warps=8 if row > MOST_BYTES // 2 else 4, num_stages=2)
  call = functools.partial(pl.pallas_call, compiler_params=parameters, interpret=interpret)
  segments = pl.BlockSpec((None, padded), lambda i, n, b: (b, 0))
  last = pl.cdiv(T, rows) - 1
  of_queries = lambda i, n, b: (b, last - i, n, 0)  # noqa: E731
  of_keys = lambda i, n, b: (b, 0, n // G, 0)  # noqa: E731
  of_position = pl.BlockSpec((None, None, rows), lambda i, n, b: (b, n, last - i))
  dq_BTNH = call(
    functools.partial(_dq_kernel, T=T, H=H, J=J, s=read, window=window),
    grid=(last + 1, N, B),
    in_specs=[
      segments,
      pl.BlockSpec((None, rows, None, h), of_queries),
      pl.BlockSpec((None, padded, None, h), of_keys),
      pl.BlockSpec((None, padded, None, j), of_keys),
      pl.BlockSpec((None, rows, None, j), of_queries),
      of_position,
      of_position,
    ],
    out_specs=pl.BlockSpec((None, rows, None, h), of_queries),
    out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
    name=_name("dq", window),
  )(*inputs)
  of_group = lambda i, n, b: (b, 0, n, 0)  # noqa: E731
  of_block = lambda i, n, b: (b, i, n, 0)  # noqa: E731
  of_positions = pl.BlockSpec((None, G, padded), lambda i, n, b: (b, n, 0))
  dk_BSKH, dv_BSKJ = call(
    functools.partial(_dkv_kernel, T=T, H=H, J=J, t=read, window=window),
    grid=(last + 1, K, B),
    in_specs=[
      segments,
      pl.BlockSpec((None, padded, G, h), of_group),
      pl.BlockSpec((None, rows, None, h), of_block),
      pl.BlockSpec((None, rows, None, j), of_block),
      pl.BlockSpec((None, padded, G, j), of_group),
      of_positions,
      of_positions,
    ],
    out_specs=[pl.BlockSpec((None, rows, None, h), of_block), pl.BlockSpec((None, rows, None, j), of_block)],
    out_shape=[
      jax.ShapeDtypeStruct(k_BSKH.shape, k_BSKH.dtype),
      jax.ShapeDtypeStruct(v_BSKJ.shape, v_BSKJ.dtype),
    ],
    name=_name("dkv", window),
  )(*inputs)
  return dq_BTNH, dk_BSKH, dv_BSKJ, jnp.sum(of_sinks_BNT[..., :T], axis=(0, 2)), None


_attention.defvjp(_forward, _backward)


def _dq_kernel(
  segments_S: Ref,
  q_th: Ref,
  k_Sh: Ref,
  v_Sj: Ref,
  of_out_tj: Ref,
  lse_t: Ref,
  mean_t: Ref,
  dq_th: Ref,
  *,
  T: int,
  H: int,
  J: int,
  s: int,
  window: int | None,
) -> None:
  """Computes the gradient of one block of queries of one head, over the blocks of keys that it sees."""
  t, h = q_th.shape
  start = pl.num_programs(0) * t - t - pl.program_id(0) * t
  queries_t, width_h, width_j = start + jnp.arange(t, dtype=jnp.int32), jnp.arange(h), jnp.arange(v_Sj.shape[1])
  segments_t = segments_S[pl.ds(start, t)]
  own_q_th = _load(q_th, _inside(queries_t, T), _inside(width_h, H))
  own_of_out_tj = _load(of_out_tj, _inside(queries_t, T), _inside(width_j, J))
  own_lse_t, own_mean_t = lse_t[...], mean_t[...]

  def add(i: jax.Array, dq_th: jax.Array) -> jax.Array:
    of_block, keys_s = pl.ds(i * s, s), i * s + jnp.arange(s, dtype=jnp.int32)
    k_sh = _load(k_Sh.at[of_block], _inside(keys_s, T), _inside(width_h, H))
    v_sj = _load(v_Sj.at[of_block], _inside(keys_s, T), _inside(width_j, J))
    seen_ts = _seen(queries_t[:, None], keys_s[None, :], window)
    seen_ts &= segments_t[:, None] == segments_S[of_block][None, :]
    logits_ts = jnp.where(seen_ts, plgpu.dot(own_q_th, k_sh, trans_b=True) * (H**-0.5 * LOG2_E), UNSEEN)
    of_probs_ts = plgpu.dot(own_of_out_tj, v_sj, trans_b=True)
    of_logits_ts = jnp.exp2(logits_ts - own_lse_t[:, None]) * (of_probs_ts - own_mean_t[:, None])
    return dq_th + plgpu.dot(of_logits_ts.astype(k_sh.dtype), k_sh)

  zeros_th = jnp.zeros((t, h), jnp.float32)
  sum_th = jax.lax.fori_loop(_first_key(start, s, window), _end_of_keys(start + t, s, T), add, zeros_th)
  _store(dq_th, (sum_th * H**-0.5).astype(dq_th.dtype), _inside(queries_t, T), _inside(width_h, H))


def _dkv_kernel(
  segments_T: Ref,
  q_TGh: Ref,
  k_sh: Ref,
  v_sj: Ref,
  of_out_TGj: Ref,
  lse_GT: Ref,
  mean_GT: Ref,
  dk_sh: Ref,
  dv_sj: Ref,
  *,
  T: int,
  H: int,
  J: int,
  t: int,
  window: int | None,
) -> None:
  """Computes the gradients of one block of keys and values of one head, over the query heads that it serves and their
  blocks of queries that see it."""
  s, h = k_sh.shape
  start = pl.program_id(0) * s
  keys_s, width_h, width_j = start + jnp.arange(s, dtype=jnp.int32), jnp.arange(h), jnp.arange(v_sj.shape[1])
  segments_s = segments_T[pl.ds(start, s)]
  own_k_sh = _load(k_sh, _inside(keys_s, T), _inside(width_h, H))
  own_v_sj = _load(v_sj, _inside(keys_s, T), _inside(width_j, J))

  def add(g: jax.Array, i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    dk_sh, dv_sj = sums
    of_block, queries_t = pl.ds(i * t, t), i * t + jnp.arange(t, dtype=jnp.int32)
    q_th = _load(q_TGh.at[of_block, g], _inside(queries_t, T), _inside(width_h, H))
    of_out_tj = _load(of_out_TGj.at[of_block, g], _inside(queries_t, T), _inside(width_j, J))
    seen_st = _seen(queries_t[None, :], keys_s[:, None], window)
    seen_st &= segments_s[:, None] == segments_T[of_block][None, :]
    logits_st = jnp.where(seen_st, plgpu.dot(own_k_sh, q_th, trans_b=True) * (H**-0.5 * LOG2_E), UNSEEN)
    probs_st = jnp.exp2(logits_st - lse_GT[g, of_block][None, :])
    dv_sj += plgpu.dot(probs_st.astype(of_out_tj.dtype), of_out_tj)
    of_probs_st = plgpu.dot(own_v_sj, of_out_tj, trans_b=True)
    of_logits_st = probs_st * (of_probs_st - mean_GT[g, of_block][None, :])
    return dk_sh + plgpu.dot(of_logits_st.astype(q_th.dtype), q_th), dv_sj

  first = start // t
  end = pl.cdiv(T, t) if window is None else jnp.minimum(pl.cdiv(T, t), pl.cdiv(start + s - 1 + window, t))
  zeros = jnp.zeros(dk_sh.shape, jnp.float32), jnp.zeros(dv_sj.shape, jnp.float32)
  of_head = lambda g, sums: jax.lax.fori_loop(first, end, functools.partial(add, g), sums)  # noqa: E731
  sum_sh, sum_sj = jax.lax.fori_loop(0, q_TGh.shape[1], of_head, zeros)
  _store(dk_sh, (sum_sh * H**-0.5).astype(dk_sh.dtype), _inside(keys_s, T), _inside(width_h, H))
  _store(dv_sj, sum_sj.astype(dv_sj.dtype), _inside(keys_s, T), _inside(width_j, J))


def _name(kernel: str, window: int | None) -> str:
  """The name of a kernel, by which `moejax.planning.kernels` prices it."""
  return f"attention_{kernel}" if window is None else f"attention_{kernel}_window_{window}"


def _seen(queries: jax.Array, keys: jax.Array, window: int | None) -> jax.Array:
  """Whether each query is at or after each key, and within the window."""
  seen = queries >= keys
  return seen if window is None else seen & (queries - keys < window)


def _first_key(start: jax.Array, s: int, window: int | None) -> jax.Array | int:
  """The first block of keys that a block of queries sees, of which the first is at `start`."""
  return 0 if window is None else jnp.maximum(start - window + 1, 0) // s


def _end_of_keys(end: jax.Array, s: int, T: int) -> jax.Array:
  """The number of blocks of keys before `end` that have keys."""
  return jnp.minimum(pl.cdiv(end, s), pl.cdiv(T, s))


def _inside(indices_x: jax.Array, size: int) -> jax.Array | None:
  """Which of these indices are in an array of this size. None: all, since `size` is a multiple of their number and
  blocks have at least one of the array."""
  return indices_x < size if size % len(indices_x) else None


def _load(block: Ref, rows_x: jax.Array | None, columns_y: jax.Array | None) -> jax.Array:
  """The block, with zeros outside these rows and columns."""
  mask = _mask(rows_x, columns_y)
  return plgpu.load(block) if mask is None else plgpu.load(block, mask=mask, other=0.0)


def _store(block: Ref, values_xy: jax.Array, rows_x: jax.Array | None, columns_y: jax.Array | None) -> None:
  plgpu.store(block, values_xy, mask=_mask(rows_x, columns_y))


def _mask(rows_x: jax.Array | None, columns_y: jax.Array | None) -> jax.Array | None:
  if rows_x is None or columns_y is None:
    return rows_x[:, None] if rows_x is not None else columns_y[None, :] if columns_y is not None else None
  return rows_x[:, None] & columns_y[None, :]


def _row_bytes(head_dims: tuple[int, ...], dtype: jnp.dtype) -> int:
  """Bytes of the longest row of a block."""
  return block_width(max(head_dims)) * jnp.dtype(dtype).itemsize


def _largest_block(T: int) -> int:
  """The power of two from 16, the smallest operand of a tensor core, to LARGEST_BLOCK that has room for T positions."""
  return min(max(pl.next_power_of_2(T), 16), LARGEST_BLOCK)


def _padded(T: int) -> int:
  """T rounded up to whole blocks."""
  return pl.cdiv(T, _largest_block(T)) * _largest_block(T)


def _whole_blocks(x_yT: jax.Array) -> jax.Array:
  """Pads the last dimension, positions, to whole blocks."""
  T = x_yT.shape[-1]
  return jnp.pad(x_yT, [(0, 0)] * (x_yT.ndim - 1) + [(0, _padded(T) - T)])
