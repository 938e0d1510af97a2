"""The attention layers by kind.

B batch  T query position  D embed
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from moejax.config.attention import Attention, GroupedQuery, Latent
from moejax.config.kinds import described, function_of, running
from moejax.config.model import Model
from moejax.errors import UserError
from moejax.models.attend import Context, KVCache
from moejax.models.attention import GroupedQueryLayer
from moejax.models.latent_attention import LatentLayer
from moejax.models.moe.router_counts import RouterCounts
from moejax.models.returned import check_returned, shown
from moejax.partitioning import Partitioner

MakeLayer = Callable[[Any, Model, Partitioner, nnx.Rngs], nnx.Module]
"""Maps (configuration of the layer, model, partitioner, random keys) to a module, which maps (normalized x_BTD,
context, cache) to (out_BTD, counts of a router or None, cache). The residual stream is added outside. `cache` is None
in training, or else has the arrays of earlier tokens, to which the module adds those of the new tokens."""

ATTENTIONS: dict[type[Attention], MakeLayer] = {GroupedQuery: GroupedQueryLayer, Latent: LatentLayer}
"""Layers by class of the configuration. Custom layers are added to it."""


def attention_layer(config: Attention, model: Model, partitioner: Partitioner, rngs: nnx.Rngs) -> Any:
  """The module of an attention layer.

  Raises:
    UserError: If ATTENTIONS has no function for it, or the parameters of its module are not those it declares.
  """
  make = function_of(config, ATTENTIONS)
  with running(config):
    layer = make(config, model, partitioner, rngs)
  if not isinstance(layer, nnx.Module):
    raise UserError(f"{described(type(config))} returned {shown(layer)}, not a flax.nnx.Module")
  declared = sorted(math.prod(shape.values()) for shape in config.shapes(model).values())
  found = sorted(leaf.size for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))
  if declared != found:
    raise UserError(f"{described(type(config))} declares parameters of sizes {declared}, but its module has {found}")
  return layer


def apply_attention(
  config: Attention, layer: Callable, x_BTD: jax.Array, context: Context, cache: KVCache | None
) -> tuple[jax.Array, RouterCounts | None, KVCache | None]:
  """The output of an attention layer, the counts of its router if it has one, and the cache with the new tokens.

  Raises:
    UserError: If the layer returns an array of another shape or dtype than its input has, or another cache.
  """
  with running(config):
    returned = layer(x_BTD, context, cache)
  if not isinstance(returned, tuple) or len(returned) != 3:
    raise UserError(f"{described(type(config))} returned {shown(returned)}, not the tuple (out_BTD, counts, cache)")
  out_BTD, counts, after = returned
  check_returned(config, "out_BTD", out_BTD, x_BTD.shape, x_BTD.dtype)
  if sorted(after or {}) != sorted(cache or {}):
    raise UserError(
      f"{described(type(config))} returned a cache with {sorted(after or {})}, not with {sorted(cache or {})}"
    )
  for name, array in (cache or {}).items():
    check_returned(config, f"cache {name}", after[name], array.shape, array.dtype)
  return out_BTD, counts, after
