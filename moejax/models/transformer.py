"""The decoder-only transformer, dense or sparse.

B batch  T position  D embed  V vocab  M = B x T tokens
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config.model import Model
from moejax.kernels.attention import ATTENTION
from moejax.models.attention import Attention
from moejax.models.feed_forward import FeedForward
from moejax.models.layers import PRODUCTS, Context, Memory, RMSNorm, rotary_angles, separate, stack, weight
from moejax.models.moe.balance import EXPERTS, HEADS, Tally
from moejax.models.moe.layer import MoELayer
from moejax.models.products import look_up, operand, product
from moejax.partitioning import Partitioner

_ATTENTION = jax.checkpoint_policies.save_only_these_names(ATTENTION)
_save = jax.checkpoint_policies.save_from_both_policies

REMAT_POLICIES = {
  "products": jax.checkpoint_policies.save_only_these_names(ATTENTION, PRODUCTS),
  "dots": _save(jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION),
  "attention": _ATTENTION,
  "layer_inputs": jax.checkpoint_policies.nothing_saveable,
}


Tallies = dict[str, Tally]
"""What the routers of each kind count, with a leading dimension of layers."""

Memories = Any
"""A Memory of every layer: for each period that of each of its blocks, arranged as the layers are, stacked or apart."""


class Block(nnx.Module):
  """One pre-norm layer: attention, then a dense or a sparse feed-forward."""

  def __init__(self, model: Model, sparse: bool, partitioner: Partitioner, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(model.d_model, model.norm_epsilon, "embed")
    self.attention = Attention(model, partitioner, rngs)
    self.feed_forward_norm = RMSNorm(model.d_model, model.norm_epsilon, "embed")
    if sparse:
      self.feed_forward: MoELayer | FeedForward = MoELayer(model, partitioner, rngs)
    else:
      self.feed_forward = FeedForward(model, model.d_ff, partitioner, rngs)

  def __call__(
    self, x_BTD: jax.Array, context: Context, memory: Memory | None, keys_B: jax.Array | None
  ) -> tuple[jax.Array, dict[str, Tally], Memory | None]:
    """x_BTD, what each router of the layer counts, and `memory` with the tokens."""
    tallies = {}
    out_BTD, of_heads, memory = self.attention(self.attention_norm(x_BTD), context, memory)
    x_BTD = x_BTD + out_BTD
    if of_heads is not None:
      tallies[HEADS] = of_heads
    normed_BTD = self.feed_forward_norm(x_BTD)
    if isinstance(self.feed_forward, FeedForward):
      return x_BTD + self.feed_forward(normed_BTD), tallies, memory
    x_BTD, tallies[EXPERTS] = self.feed_forward(normed_BTD, context.segments_BT > 0, keys_B, x_BTD)
    return x_BTD, tallies, memory


class Period(nnx.Module):
  """The layers after which the pattern of dense and sparse repeats; the last one is sparse, if any is."""

  def __init__(self, model: Model, partitioner: Partitioner, rngs: nnx.Rngs):
    sparse = [model.moe is not None and i == model.period - 1 for i in range(model.period)]
    self.blocks = nnx.List([Block(model, is_sparse, partitioner, rngs) for is_sparse in sparse])

  def __call__(
    self, x_BTD: jax.Array, context: Context, memories: tuple[Memory, ...] | None, keys_B: jax.Array | None
  ) -> tuple[jax.Array, Tallies, tuple[Memory | None, ...]]:
    """x_BTD, what routers count with a leading dimension of the layers of this period that have them, and `memories`
    with the tokens."""
    tallies: list[dict[str, Tally]] = []
    after = []
    for block, memory in zip(self.blocks, memories or (None,) * len(self.blocks), strict=True):
      x_BTD, of_block, memory = block(x_BTD, context, memory, keys_B)
      tallies.append(of_block)
      after.append(memory)
    return x_BTD, _stacked(tallies), tuple(after)


def _stacked(tallies: list[dict[str, Tally]]) -> Tallies:
  """One array for each count, with a leading dimension of the layers that have it."""
  return {
    kind: jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *(found[kind] for found in tallies if kind in found))
    for kind in dict.fromkeys(kind for found in tallies for kind in found)
  }


class Transformer(nnx.Module):
  """Tokens to features (`__call__`), features to logits (`logits`)."""

  def __init__(self, model: Model, partitioner: Partitioner, rngs: nnx.Rngs):
    V, D = model.vocab_size, model.d_model
    self.embedding_VD = weight(rngs, (V, D), ("vocab", "embed"), fan_in=D)
    arrange = stack if model.layers == "scanned" else separate
    self.layers = arrange(lambda layer_rngs: Period(model, partitioner, layer_rngs), model.num_periods, rngs)
    self.final_norm = RMSNorm(D, model.norm_epsilon, "embed")
    self.w_logits_DV = None if model.tie_embeddings else weight(rngs, (D, V), ("embed", "vocab"), fan_in=D)
    self.model = model
    self.partitioner = partitioner

  def __call__(
    self, tokens_BT: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array, keys_B: jax.Array | None = None
  ) -> tuple[jax.Array, Tallies]:
    """x_BTD after the last norm, and what routers count with a leading dimension of the layers that have them.

    Args:
      tokens_BT: token ids.
      segments_BT: 1, 2, ... by document, 0 for padding; a document sees only itself.
      positions_BT: position in the document, from 0.
      keys_B: random keys of the sequences, for routers' noise in training; None has no noise.
    """
    x_BTD, tallies, _ = self._layers(tokens_BT, segments_BT, positions_BT, None, keys_B)
    return x_BTD, tallies

  def extend(
    self, tokens_BT: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array, memories: Memories
  ) -> tuple[jax.Array, Memories]:
    """x_BTD of tokens that follow those in `memories`, and `memories` with them; no documents are packed here.

    Args:
      tokens_BT: token ids.
      segments_BT: 1, and 0 for padding, which stands after the tokens.
      positions_BT: position in the sequence, rising by 1 along T; the slots that the tokens take.
      memories: of every layer.
    """
    x_BTD, _, memories = self._layers(tokens_BT, segments_BT, positions_BT, memories, None)
    return x_BTD, memories

  def logits(self, x_MD: jax.Array) -> jax.Array:
    """logits_MV in float32."""
    with jax.named_scope("logits"):
      tied = self.w_logits_DV is None
      weight = self.embedding_VD if self.w_logits_DV is None else self.w_logits_DV
      held = operand(weight[...], x_MD.dtype, self.model.gradient_dtype)
      logits_MV = product("MD,VD->MV" if tied else "MD,DV->MV", x_MD, held, result=jnp.float32)
      cap = self.model.logit_cap
      return logits_MV if cap is None else cap * jnp.tanh(logits_MV / cap)

  def _layers(
    self,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    memories: Memories,
    keys_B: jax.Array | None,
  ) -> tuple[jax.Array, Tallies, Memories]:
    dtype = self.partitioner.compute_dtype(self.model)
    with jax.named_scope("embed"):
      x_BTD = look_up(operand(self.embedding_VD[...], dtype, self.model.gradient_dtype), tokens_BT)
      x_BTD = self.partitioner.constrain(x_BTD, "batch", "sequence", "act_embed")
    angles = rotary_angles(positions_BT, self.model.head_dim, self.model.rope_theta)
    x_BTD, tallies, memories = self._periods(x_BTD, Context(segments_BT, positions_BT, angles), memories, keys_B)
    return self.final_norm(x_BTD), tallies, memories

  def _periods(
    self, x_BTD: jax.Array, context: Context, memories: Memories, keys_B: jax.Array | None
  ) -> tuple[jax.Array, Tallies, Memories]:
    """Runs all layers; what their routers count has a leading dimension of layers."""
    keys_LB = None
    if keys_B is not None:
      keys_LB = jax.vmap(lambda key: jax.random.split(key, self.model.num_periods), out_axes=1)(keys_B)

    def run(
      graph: nnx.GraphDef, parameters: nnx.State, memory: Memories, keys_B: jax.Array | None, x_BTD: jax.Array
    ) -> tuple[jax.Array, Tallies, Memories]:
      return nnx.merge(graph, parameters)(x_BTD, context, memory, keys_B)

    if self.model.remat != "none":
      # In a scan nothing is merged across iterations anyway, so the barrier against it only costs.
      run = jax.checkpoint(
        run, policy=REMAT_POLICIES[self.model.remat], prevent_cse=self.model.layers != "scanned", static_argnums=0
      )
    if isinstance(self.layers, nnx.List):
      counted, after = [], []
      for i, period in enumerate(self.layers):
        graph, parameters = nnx.split(period)
        memory, of_period = memories and memories[i], None if keys_LB is None else keys_LB[i]
        x_BTD, tallies, memory = run(graph, nnx.as_pure(parameters), memory, of_period, x_BTD)
        counted.append(tallies)
        after.append(memory)
      return x_BTD, jax.tree.map(lambda *of_periods: jnp.concatenate(of_periods), *counted), tuple(after)
    graph, parameters = nnx.split(self.layers)

    def body(
      x_BTD: jax.Array, of_period: tuple[nnx.State, Memories, jax.Array | None]
    ) -> tuple[jax.Array, tuple[Tallies, Memories]]:
      x_BTD, tallies, memory = run(graph, *of_period, x_BTD)
      return x_BTD, (tallies, memory)

    x_BTD, (tallies, memories) = jax.lax.scan(body, x_BTD, (nnx.as_pure(parameters), memories, keys_LB))
    tallies = jax.tree.map(lambda of_periods: of_periods.reshape(-1, *of_periods.shape[2:]), tallies)
    return x_BTD, tallies, memories
