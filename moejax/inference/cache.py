"""The KV cache of all layers, and the length of each sequence.

B batch  T query position  S key position  K key/value heads  H head dim  D embed
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from moejax.models.abstract import AbstractModel
from moejax.models.attention import KVCache
from moejax.models.transformer import KVCaches, Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """The KV cache of a batch of sequences."""

  layers: KVCaches
  """The KV cache of every layer, in the dtype of activations."""
  lengths_B: jax.Array
  """The number of tokens of each sequence, int32, which is also the position of its next token in the cache."""


def empty_cache(model: AbstractModel, batch_size: int, slots: int) -> Cache:
  """An empty cache for up to `slots` tokens of each sequence."""
  config = model.config
  shape = (batch_size, slots, config.num_kv_heads, config.head_dim)
  dtype = model.partitioner.compute_dtype(config)

  def of_period(*leading: int) -> tuple[KVCache, ...]:
    zeros = jnp.zeros((*leading, *shape), dtype)
    return tuple(KVCache(zeros, zeros) for _ in range(config.period))

  apart = config.layers == "unrolled"
  layers = tuple(of_period() for _ in range(config.num_periods)) if apart else of_period(config.num_periods)
  return Cache(layers, jnp.zeros((batch_size,), jnp.int32))


def cache_shardings(model: AbstractModel, batch_size: int) -> Cache:
  """The sharding of a cache, by batch and heads as in attention. One NamedSharding applies to all layers.

  Raises:
    UserError: If the batch or the heads are not divisible by the mesh.
  """
  config, partitioner = model.config, model.partitioner
  names: tuple[str | None, ...] = ("batch", None, "kv_heads", None)
  shape: tuple[int, ...] = (batch_size, 1, config.num_kv_heads, config.head_dim)
  if config.layers == "scanned":
    names, shape = ("layers", *names), (config.num_periods, *shape)
  of_caches = partitioner.sharding(names, shape, "KV cache")
  return Cache(of_caches, row_sharding(model, batch_size))  # type: ignore[arg-type]  # placements for arrays


def row_sharding(model: AbstractModel, batch_size: int) -> NamedSharding:
  """The sharding of an array with one value for each sequence."""
  return model.partitioner.sharding(("batch",), (batch_size,), "rows of the batch")


def extend(
  transformer: Transformer, tokens_BT: jax.Array, counts_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
  """Returns the features x_BTD of the next tokens of each sequence, and the cache extended by them. Used by prefill and
  decoding.

  Args:
    transformer: transformer of an `inference_model`, which does not drop tokens.
    tokens_BT: the new tokens of each row, padded at the end.
    counts_B: the number of new tokens of each row. A row without any is unchanged.
    cache: the cache, with at least T free positions in every row.
  """
  steps_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
  positions_BT = cache.lengths_B[:, None] + steps_T[None, :]
  segments_BT = (steps_T[None, :] < counts_B[:, None]).astype(jnp.int32)
  x_BTD, layers = transformer.extend(tokens_BT, segments_BT, positions_BT, cache.layers)
  return x_BTD, Cache(layers, cache.lengths_B + counts_B)
