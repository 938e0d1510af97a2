"""The KV cache of all layers, and the length of each sequence.

B batch  T query position  S key position  K key/value heads  H head dim  D embed
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from moejax.config.attention import Attention
from moejax.config.feed_forward import Shape
from moejax.models.abstract import AbstractModel
from moejax.models.depths import THROUGH
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
  dtype = model.partitioner.compute_dtype(model.config)
  zeros = _of_layers(
    model, lambda leading, of_token: jnp.zeros((*leading, batch_size, slots, *of_token.values()), dtype)
  )
  return Cache(zeros, jnp.zeros((batch_size,), jnp.int32))


def cache_shardings(model: AbstractModel, batch_size: int) -> Cache:
  """The sharding of a cache, by batch and heads as in attention.

  Raises:
    UserError: If the batch or the heads are not divisible by the mesh.
  """

  def sharding(leading: tuple[int, ...], of_token: Shape) -> NamedSharding:
    names, shape = ("batch", None, *of_token), (batch_size, 1, *of_token.values())
    return model.partitioner.sharding((*("layers",) * len(leading), *names), (*leading, *shape), "KV cache")

  return Cache(_of_layers(model, sharding), row_sharding(model, batch_size))  # type: ignore[arg-type]  # placements


def _of_layers(model: AbstractModel, make: Callable[[tuple[int, ...], Shape], Any]) -> KVCaches:
  """The tree of the caches of all layers.

  Args:
    model: the model.
    make: maps the leading dimensions of an array, and the shape of what it has for one token, to a leaf.
  """
  config = model.config

  def of_layers(
    attentions: tuple[Attention, ...], routed: tuple[bool, ...], *leading: int
  ) -> tuple[dict[str, Any], ...]:
    through: dict[str, Shape] = {THROUGH: {}}
    layers = zip(attentions, routed, strict=True)
    cached = ({**attention.cached(config), **(through if is_routed else {})} for attention, is_routed in layers)
    return tuple({name: make(leading, of_token) for name, of_token in of_layer.items()} for of_layer in cached)

  periods, of_period = config.num_periods, (config.attention_layers, config.routed_layers)
  apart = config.layers == "unrolled"
  repeated = tuple(of_layers(*of_period) for _ in range(periods)) if apart else of_layers(*of_period, periods)
  leading = config.leading_attention
  return of_layers(leading, (False,) * len(leading)), repeated


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
