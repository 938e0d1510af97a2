"""The decoder-only transformer, dense or sparse.

B batch  T query position  D embed  V vocab  L stacked layers  M tokens
Z = chunks of a sequence
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config.model import Model
from moejax.kernels.cross_entropy import cross_entropy
from moejax.models.attend import Context, KVCache, context_of
from moejax.models.block import Block
from moejax.models.depths import RoutedBlock
from moejax.models.moe.router_counts import RouterCounts
from moejax.models.multi_token import MultiTokenModule, Tokens
from moejax.models.norms import residual_norm
from moejax.models.products import look_up, operand, product
from moejax.models.remat import layer_inputs, policy, recomputed
from moejax.models.stacking import separate, stack
from moejax.models.weights import weight
from moejax.partitioning import Partitioner

LayerCounts = dict[str, RouterCounts]
"""The counts of each kind of router, with a leading dimension of layers."""

KVCaches = Any
"""The KVCache of every layer: a tuple of those of the leading layers, and for each period a tuple of its blocks'
caches, stacked or apart as the layers are."""


class TargetScores(NamedTuple):
  """How well logits predict target tokens."""

  loss_BT: jax.Array
  """Cross-entropy in nats, float32."""
  log_normalizer_BT: jax.Array
  """Logarithm of the sum of the exponentials of the logits, float32."""
  is_best_BT: jax.Array
  """Whether the target has the largest logit."""


class Period(nnx.Module):
  """One period of the pattern of attention, dense, sparse and routed layers, which may be sparse too. The last layer is
  sparse or routed, if any is."""

  def __init__(self, model: Model, partitioner: Partitioner, rngs: nnx.Rngs):
    layers = zip(model.attention_layers, model.sparse_layers, model.routed_layers, strict=True)
    self.blocks = nnx.List(
      [
        (RoutedBlock if is_routed else Block)(attention, model, is_sparse, partitioner, rngs)
        for attention, is_sparse, is_routed in layers
      ]
    )

  def __call__(
    self, x_BTD: jax.Array, context: Context, caches: tuple[KVCache, ...] | None, keys_B: jax.Array | None
  ) -> tuple[jax.Array, LayerCounts, tuple[KVCache | None, ...]]:
    """Returns x_BTD, the routers' counts with a leading dimension of this period's layers that have them, and `caches`
    extended by the tokens."""
    counts: list[dict[str, RouterCounts]] = []
    after = []
    for block, cache in zip(self.blocks, caches or (None,) * len(self.blocks), strict=True):
      x_BTD, of_block, cache = block(x_BTD, context, cache, keys_B)
      counts.append(of_block)
      after.append(cache)
    return x_BTD, _stacked(counts), tuple(after)


def _stacked(counts: list[dict[str, RouterCounts]]) -> LayerCounts:
  """One array for each count, with a leading dimension of the layers that have it."""
  return {
    kind: jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *(found[kind] for found in counts if kind in found))
    for kind in dict.fromkeys(kind for found in counts for kind in found)
  }


class Transformer(nnx.Module):
  """The model: `__call__` computes features from tokens, and `logits` and `score` read them."""

  def __init__(self, model: Model, partitioner: Partitioner, rngs: nnx.Rngs):
    V, D = model.vocab_size, model.d_model
    self.embedding_VD = weight(rngs, (V, D), ("vocab", "embed"), fan_in=D)
    arrange = stack if model.layers == "scanned" else separate
    self.layers = arrange(lambda layer_rngs: Period(model, partitioner, layer_rngs), model.num_periods, rngs)
    self.final_norm = residual_norm(model)
    self.w_logits_DV = None if model.tie_embeddings else weight(rngs, (D, V), ("embed", "vocab"), fan_in=D)
    self.leading = nnx.List(
      [Block(attention, model, False, partitioner, rngs) for attention in model.leading_attention]
    )
    depths = range(model.multi_token_depth)
    self.multi_token = nnx.List([MultiTokenModule(model, partitioner, rngs) for _ in depths])
    self.model = model
    self.partitioner = partitioner

  def __call__(
    self, tokens_BT: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array, keys_B: jax.Array | None = None
  ) -> tuple[jax.Array, LayerCounts]:
    """Returns x_BTD after the last norm, and the routers' counts with a leading dimension of the layers that have them.

    Args:
      tokens_BT: token ids.
      segments_BT: 1, 2, ... by document, 0 for padding. Tokens attend only within their document.
      positions_BT: position in the document, from 0.
      keys_B: random keys of the sequences, for the noise of routers in training. None means no noise.
    """
    x_BTD, counts, _ = self._layers(tokens_BT, segments_BT, positions_BT, None, keys_B)
    return x_BTD, counts

  def predict_ahead(
    self, x_BTD: jax.Array, of_depths: Sequence[Tokens], keys_B: jax.Array | None = None
  ) -> list[tuple[jax.Array, LayerCounts]]:
    """Returns x_BTD and the routers' counts of each module for multi-token prediction (arXiv 2412.19437, section 2.2).

    Args:
      x_BTD: what `__call__` returns.
      of_depths: the tokens of each depth, from `tokens_ahead`.
      keys_B: as in `__call__`.
    """
    found = []
    for depth, (module, tokens) in enumerate(zip(self.multi_token, of_depths, strict=True)):
      context = context_of(self.model, tokens.segments_BT, tokens.positions_BT)
      number = self.model.num_periods + depth
      of_depth = None if keys_B is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, number)
      run = recomputed(module, self.model, lambda run, x, own=(context, of_depth): run(*x, *own))
      x_BTD, counts = run((x_BTD, self._embed(tokens.tokens_BT)))
      found.append((module.final_norm(x_BTD), counts))
    return found

  def extend(
    self, tokens_BT: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array, caches: KVCaches
  ) -> tuple[jax.Array, KVCaches]:
    """Returns x_BTD of tokens that follow those in `caches`, and `caches` extended by them. Each row is one document.

    Args:
      tokens_BT: token ids.
      segments_BT: 1, and 0 for padding, which stands after the tokens.
      positions_BT: position in the sequence, which is also the slot of the token in the cache. Rises by 1 along T.
      caches: of every layer.
    """
    x_BTD, _, caches = self._layers(tokens_BT, segments_BT, positions_BT, caches, None)
    return x_BTD, caches

  def logits(self, x: jax.Array) -> jax.Array:
    """Returns logits_MV of x_MD, or logits_BTV of x_BTD, in float32."""
    with jax.named_scope("logits"):
      tokens, tied = "M" if x.ndim == 2 else "BT", self.w_logits_DV is None
      weight = self.embedding_VD if self.w_logits_DV is None else self.w_logits_DV
      held = operand(weight[...], x.dtype, self.model.gradient_dtype, self.model.precision.logits)
      equation, on_gpu = f"{tokens}D,{'VD' if tied else 'DV'}->{tokens}V", self.partitioner.platform == "gpu"
      logits = product(equation, x, held, result=jnp.float32, rounds_gradient=on_gpu)
      cap = self.model.logit_cap
      return logits if cap is None else cap * jnp.tanh(logits / cap)

  def score(self, x_BTD: jax.Array, targets_BT: jax.Array) -> TargetScores:
    """Scores each target token against the features at its position, one chunk of the sequences after the other."""
    (B, T, D), chunks = x_BTD.shape, math.gcd(self.model.logit_chunks, x_BTD.shape[1])
    if chunks == 1:
      return self._score(x_BTD, targets_BT)
    # The batch stays whole, so that every device has its part of each chunk. For the same reason, a chunk has each n-th
    # token if sequences are sharded.
    apart = self.partitioner.shards("sequence") > 1
    shape, dimension = ((B, T // chunks, chunks), 2) if apart else ((B, chunks, T // chunks), 1)
    x_ZBTD = jnp.moveaxis(x_BTD.reshape(*shape, D), dimension, 0)
    targets_ZBT = jnp.moveaxis(targets_BT.reshape(shape), dimension, 0)
    score = jax.checkpoint(self._score, prevent_cse=False)
    scores = jax.lax.map(lambda of_chunk: score(*of_chunk), (x_ZBTD, targets_ZBT))
    return TargetScores(*(jnp.moveaxis(x_ZBT, 0, dimension).reshape(B, T) for x_ZBT in scores))

  def _score(self, x_BTD: jax.Array, targets_BT: jax.Array) -> TargetScores:
    if self.partitioner.shards("sequence") > 1:
      return self._score_sharded_sequences(x_BTD, targets_BT)
    logits_MV = self.logits(x_BTD.reshape(-1, x_BTD.shape[-1]))
    logits_MV = self.partitioner.constrain(logits_MV, "batch", "vocab")
    with jax.named_scope("loss"):
      targets_M = targets_BT.reshape(-1)
      loss_M, log_normalizer_M = cross_entropy(logits_MV, targets_M, self.partitioner.shards("vocab") == 1)
      is_best_M = jnp.argmax(logits_MV, axis=-1) == targets_M
    return TargetScores(*(x_M.reshape(targets_BT.shape) for x_M in (loss_M, log_normalizer_M, is_best_M)))

  def _score_sharded_sequences(self, x_BTD: jax.Array, targets_BT: jax.Array) -> TargetScores:
    """The same without flattened tokens, which cannot be sharded over batch and sequence."""
    logits_BTV = self.partitioner.constrain(self.logits(x_BTD), "batch", "sequence", "vocab")
    whole_vocabulary = self.partitioner.shards("vocab") == 1
    with jax.named_scope("loss"):
      score = jax.vmap(lambda logits_TV, targets_T: cross_entropy(logits_TV, targets_T, whole_vocabulary))
      is_best_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
      return TargetScores(*score(logits_BTV, targets_BT), is_best_BT)

  def _layers(
    self,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    caches: KVCaches,
    keys_B: jax.Array | None,
  ) -> tuple[jax.Array, LayerCounts, KVCaches]:
    x_BTD = self._embed(tokens_BT)
    context = context_of(self.model, segments_BT, positions_BT)
    of_leading, of_periods = caches or (None, None)
    x_BTD, of_leading = self._leading(x_BTD, context, of_leading)
    x_BTD, counts, of_periods = self._periods(x_BTD, context, of_periods, keys_B)
    return self.final_norm(x_BTD), counts, (of_leading, of_periods)

  def _embed(self, tokens_BT: jax.Array) -> jax.Array:
    dtype = self.partitioner.compute_dtype(self.model)
    with jax.named_scope("embed"):
      x_BTD = look_up(operand(self.embedding_VD[...], dtype, self.model.gradient_dtype), tokens_BT)
      if self.model.embedding_scale != 1.0:
        x_BTD = x_BTD * self.model.embedding_scale
      return self.partitioner.constrain(x_BTD, "batch", "sequence", "act_embed")

  def _leading(
    self, x_BTD: jax.Array, context: Context, caches: tuple[KVCache, ...] | None
  ) -> tuple[jax.Array, tuple[KVCache | None, ...]]:
    """Runs the dense layers before the repeated ones."""

    after = []
    for block, cache in zip(self.leading, caches or (None,) * len(self.leading), strict=True):
      run = recomputed(block, self.model, lambda block, x_BTD, cache: block(x_BTD, context, cache, None))
      x_BTD, _, cache = run(x_BTD, cache)
      after.append(cache)
    return x_BTD, tuple(after)

  def _periods(
    self, x_BTD: jax.Array, context: Context, caches: KVCaches, keys_B: jax.Array | None
  ) -> tuple[jax.Array, LayerCounts, KVCaches]:
    """Runs all layers. The routers' counts have a leading dimension of layers."""
    keys_LB = None
    if keys_B is not None:
      keys_LB = jax.vmap(lambda key: jax.random.split(key, self.model.num_periods), out_axes=1)(keys_B)

    def run(
      graph: nnx.GraphDef, parameters: nnx.State, cache: KVCaches, keys_B: jax.Array | None, x_BTD: jax.Array
    ) -> tuple[jax.Array, LayerCounts, KVCaches]:
      return nnx.merge(graph, parameters)(layer_inputs(x_BTD, self.model), context, cache, keys_B)

    if self.model.remat != "none":
      # In a scan XLA merges nothing across iterations, so that the barrier against it (`prevent_cse`) only costs time.
      run = jax.checkpoint(run, policy=policy(self.model), prevent_cse=self.model.layers != "scanned", static_argnums=0)
    if isinstance(self.layers, nnx.List):
      counted, after = [], []
      for i, period in enumerate(self.layers):
        graph, parameters = nnx.split(period)
        cache, of_period = caches and caches[i], None if keys_LB is None else keys_LB[i]
        x_BTD, counts, cache = run(graph, nnx.as_pure(parameters), cache, of_period, x_BTD)
        counted.append(counts)
        after.append(cache)
      return x_BTD, jax.tree.map(lambda *of_periods: jnp.concatenate(of_periods), *counted), tuple(after)
    graph, parameters = nnx.split(self.layers)

    def body(
      x_BTD: jax.Array, of_period: tuple[nnx.State, KVCaches, jax.Array | None]
    ) -> tuple[jax.Array, tuple[LayerCounts, KVCaches]]:
      x_BTD, counts, cache = run(graph, *of_period, x_BTD)
      return x_BTD, (counts, cache)

    x_BTD, (counts, caches) = jax.lax.scan(body, x_BTD, (nnx.as_pure(parameters), caches, keys_LB))
    counts = jax.tree.map(lambda of_periods: of_periods.reshape(-1, *of_periods.shape[2:]), counts)
    return x_BTD, counts, caches
