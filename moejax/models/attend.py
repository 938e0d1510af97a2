"""Attention on the devices of a mesh, of which each computes its own sequences and query heads.

B batch  T query position  S key position  N query heads  K key/value heads  H head dim
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.config.attention import Rotary
from moejax.config.model import Model
from moejax.kernels.attention import attention, attention_for, heads_served, is_folded, parts_before
from moejax.kernels.cached_attention import cached_attention, store
from moejax.models.rotary import Angles, rotary_angles
from moejax.partitioning import Names, Partitioner

QUERIES, KEYS = ("batch", "sequence", "heads", None), ("batch", "sequence", "kv_heads", None)
"""Logical axes of queries, and of keys and values. The head dimension is not sharded here: the rule `head_dim` applies
only to parameters."""

KVCache = dict[str, jax.Array]
"""What one layer keeps of earlier tokens: the arrays [B, S, ...] of `Attention.cached`. Position p of a sequence is at
slot p."""


class Context(NamedTuple):
  """What every attention layer needs of the tokens."""

  segments_BT: jax.Array
  positions_BT: jax.Array
  angles: Mapping[Rotary, Angles]
  """Cosine and sine of each rotary embedding of the model, from `rotary_angles`."""


def context_of(model: Model, segments_BT: jax.Array, positions_BT: jax.Array) -> Context:
  """The context of tokens, with the angles of every rotary embedding of the model."""
  rotaries = dict.fromkeys(attention.rotary(model) for attention in model.attention)
  angles = {rotary: rotary_angles(positions_BT, *rotary) for rotary in rotaries if rotary is not None}
  return Context(segments_BT, positions_BT, angles)


def attend(
  partitioner: Partitioner,
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segments_BT: jax.Array,
  window: int | None = None,
  sinks_N: jax.Array | None = None,
) -> jax.Array:
  """Returns out_BTNH of tokens that attend to each other. The arguments are those of `kernels.attention.attention`.

  If sequences are sharded, each device gathers the keys and values of its whole sequences or, if the window is short,
  gets those of the parts before its own. The fused kernel without a window attends with queries that devices exchange
  before and return after, so that all have equal work.
  """
  parts = partitioner.shards("sequence")
  best = attention_for(_platform(partitioner), q_BTNH, v_BTKH, parts)
  group = q_BTNH.shape[2] // k_BTKH.shape[2]

  def on_device(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, sinks: dict[str, jax.Array]
  ) -> jax.Array:
    k_BTKH, v_BTKH = (_served(partitioner, q_BTNH, x_BTKH, group) for x_BTKH in (k_BTKH, v_BTKH))
    if parts == 1:
      return best(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, **sinks)
    before = parts_before(q_BTNH.shape[1], parts, window)
    k_BSKH, v_BSKH, segments_BS = (_of_keys(partitioner, x, before) for x in (k_BTKH, v_BTKH, segments_BT + 1))
    segments_BS -= 1  # before the first part, it becomes -1, the number of no document
    part = partitioner.index("sequence") if before is None else before
    if best is not attention:
      q_BTNH, segments_BT = (_fold(partitioner, x, window) for x in (q_BTNH, segments_BT))
      out_BTNH = best(q_BTNH, k_BSKH, v_BSKH, segments_BT, window, **sinks, segments_BS=segments_BS, part=part)
      return _fold(partitioner, out_BTNH, window, back=True)
    first = part * q_BTNH.shape[1]
    return attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, window, **sinks, segments_BS=segments_BS, first=first)

  sinks = {} if sinks_N is None else {"sinks_N": sinks_N}
  keys = _keys(partitioner, k_BTKH.shape[2])
  run = partitioner.on_each_device(
    on_device,
    (QUERIES, keys, keys, ("batch", "sequence"), dict.fromkeys(sinks, ("heads",))),
    QUERIES,
    exchanging=best is not attention or parts > 1,
  )
  return run(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks)


def _platform(partitioner: Partitioner) -> str:
  """The platform, where "gpu" is one for which Pallas compiles Triton kernels: of NVIDIA, from Ampere on."""
  capability = getattr(partitioner.device, "compute_capability", "8.0")
  has_triton = re.fullmatch(r"\d+\.\d+", str(capability)) and float(capability) >= 8.0
  return partitioner.platform if partitioner.platform != "gpu" or has_triton else "older gpu"


def _of_keys(partitioner: Partitioner, x_BT: jax.Array, before: int | None) -> jax.Array:
  """The arrays [B, T, ...] of all parts of the sequences, or of so many parts `before` this device's own and of this,
  one after the other. Before the first part, there are zeros."""
  if before is None:
    return partitioner.gather(x_BT, "sequence", 1)
  to_next = [(part, part + 1) for part in range(partitioner.shards("sequence") - 1)]
  found = [x_BT]
  for _ in range(before):
    found.insert(0, partitioner.send(found[0], "sequence", to_next))
  return jnp.concatenate(found, axis=1)


def _fold(partitioner: Partitioner, x_BT: jax.Array, window: int | None, back: bool = False) -> jax.Array:
  """Exchanges the halves [B, T / 2, ...] of each device's part of the sequences, so that positions are those of
  `kernels.attention.query_order`, or back."""
  parts = partitioner.shards("sequence")
  if not is_folded(parts, window):
    return x_BT
  target = [min(half, 2 * parts - 1 - half) for half in range(2 * parts)]
  moves = [[(sender, target[2 * sender + odd]) for sender in range(parts)] for odd in range(2)]
  if back:
    moves = [[(receiver, sender) for sender, receiver in pairs] for pairs in moves]
  halves = zip(jnp.split(x_BT, 2, axis=1), moves, strict=True)
  return jnp.concatenate([partitioner.send(half, "sequence", pairs) for half, pairs in halves], axis=1)


def attend_cached(
  partitioner: Partitioner,
  q_BTNH: jax.Array,
  new: KVCache,
  cache: KVCache,
  positions_BT: jax.Array,
  keys_and_values: Callable[[KVCache], tuple[jax.Array, jax.Array]],
  window: int | None = None,
  chunk: int | None = None,
  sinks_N: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
  """Returns out_BTNH of new tokens, and `cache` extended by them.

  Args:
    partitioner: places the arrays.
    q_BTNH: queries.
    new: the arrays [B, T, K, ...] of the new tokens that are cached.
    cache: the arrays [B, S, K, ...] of earlier tokens.
    positions_BT: positions of the new tokens.
    keys_and_values: k_BSKH and v_BSKH from the cached arrays.
    window: as in `kernels.cached_attention.cached_attention`, like `chunk` and `sinks_N`.
    chunk: see there.
    sinks_N: see there.
  """
  heads = next(iter(new.values())).shape[2]
  group = q_BTNH.shape[2] // heads

  def on_device(
    q_BTNH: jax.Array, new: KVCache, cache: KVCache, positions_BT: jax.Array, sinks: dict[str, jax.Array]
  ) -> tuple[jax.Array, KVCache]:
    cache = {name: store(kept, new[name], positions_BT) for name, kept in cache.items()}
    k_BSKH, v_BSKH = (_served(partitioner, q_BTNH, x_BSKH, group) for x_BSKH in keys_and_values(cache))
    return cached_attention(q_BTNH, k_BSKH, v_BSKH, positions_BT, window, chunk, **sinks), cache

  sinks = {} if sinks_N is None else {"sinks_N": sinks_N}
  keys = _keys(partitioner, heads)
  slots: Any = dict.fromkeys(cache, ("batch", None, *keys[2:]))
  run = partitioner.on_each_device(
    on_device,
    (QUERIES, dict.fromkeys(new, keys), slots, ("batch", "sequence"), dict.fromkeys(sinks, ("heads",))),
    (QUERIES, slots),
  )
  return run(q_BTNH, new, cache, positions_BT, sinks)


def _keys(partitioner: Partitioner, num_kv_heads: int) -> Names:
  """Logical axes of keys and values in attention. Their heads are sharded only if each then lies with the query heads
  that it serves. Otherwise every device has all of them."""
  queries, keys = partitioner.axes("heads"), partitioner.axes("kv_heads", num_kv_heads)
  return KEYS if queries[: len(keys)] == keys else (*KEYS[:2], None, None)


def _served(partitioner: Partitioner, q_BTNH: jax.Array, x_BSKH: jax.Array, group: int) -> jax.Array:
  """The keys or values of a device that its query heads attend to."""
  queries, keys = q_BTNH.shape[2], x_BSKH.shape[2]
  sharing = group * keys // queries  # devices with queries of these heads
  return heads_served(x_BSKH, partitioner.index("heads") % sharing * queries, queries, group)
