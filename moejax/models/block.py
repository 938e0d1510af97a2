"""One layer of the transformer.

B batch  T query position  D embed
"""

from typing import Any

import jax
from flax import nnx

from moejax.config.attention import Attention
from moejax.config.model import Model
from moejax.models.attend import Context, KVCache
from moejax.models.attentions import apply_attention, attention_layer
from moejax.models.feed_forward import apply_feed_forward, feed_forward
from moejax.models.moe.layer import MoELayer
from moejax.models.moe.router_counts import EXPERTS, HEADS, RouterCounts
from moejax.models.norms import residual_norm
from moejax.partitioning import Partitioner


class Block(nnx.Module):
  """One layer: attention, then a dense or a sparse feed-forward, with norms before or after each of them."""

  def __init__(self, attention: Attention, model: Model, sparse: bool, partitioner: Partitioner, rngs: nnx.Rngs):
    before, after = (model.norm_places in (place, "both") for place in ("before", "after"))
    self.attention_norm = residual_norm(model) if before else None
    self.attention: Any = attention_layer(attention, model, partitioner, rngs)
    self.attention_out_norm = residual_norm(model) if after else None
    self.feed_forward_norm = residual_norm(model) if before else None
    self.feed_forward_out_norm = residual_norm(model) if after else None
    make = MoELayer if sparse else feed_forward
    self.feed_forward: Any = make(model, partitioner, rngs)
    self.of_attention, self.of_feed_forward = attention, model.feed_forward

  def __call__(
    self, x_BTD: jax.Array, context: Context, cache: KVCache | None, keys_B: jax.Array | None
  ) -> tuple[jax.Array, dict[str, RouterCounts], KVCache | None]:
    """Returns x_BTD, the counts of each router of the layer, and `cache` extended by the tokens."""
    x_BTD, normed_BTD, counts, cache = self.attend(x_BTD, context, cache)
    x_BTD, of_experts = self.feed(x_BTD, normed_BTD, context.segments_BT > 0, keys_B)
    return x_BTD, counts | of_experts, cache

  def attend(
    self, x_BTD: jax.Array, context: Context, cache: KVCache | None
  ) -> tuple[jax.Array, jax.Array, dict[str, RouterCounts], KVCache | None]:
    """Returns x_BTD after attention, the input of the feed-forward layer, the counts of the router over heads, and
    `cache` extended by the tokens."""
    normed_BTD = x_BTD if self.attention_norm is None else self.attention_norm(x_BTD)
    out_BTD, of_heads, cache = apply_attention(self.of_attention, self.attention, normed_BTD, context, cache)
    x_BTD = x_BTD + (out_BTD if self.attention_out_norm is None else self.attention_out_norm(out_BTD))
    normed_BTD = x_BTD if self.feed_forward_norm is None else self.feed_forward_norm(x_BTD)
    return x_BTD, normed_BTD, {} if of_heads is None else {HEADS: of_heads}, cache

  def feed(
    self, x_BTD: jax.Array, normed_BTD: jax.Array, valid_BT: jax.Array, keys_B: jax.Array | None
  ) -> tuple[jax.Array, dict[str, RouterCounts]]:
    """Returns x_BTD after the feed-forward layer, and the counts of the router over experts."""
    norm = self.feed_forward_out_norm
    if not isinstance(self.feed_forward, MoELayer):
      out_BTD = apply_feed_forward(self.of_feed_forward, self.feed_forward, normed_BTD)
      return x_BTD + (out_BTD if norm is None else norm(out_BTD)), {}
    if norm is not None:
      out_BTD, counts = self.feed_forward(normed_BTD, valid_BT, keys_B)
      return x_BTD + norm(out_BTD), {EXPERTS: counts}
    x_BTD, counts = self.feed_forward(normed_BTD, valid_BT, keys_B, x_BTD)
    return x_BTD, {EXPERTS: counts}
