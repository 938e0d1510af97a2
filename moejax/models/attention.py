"""Grouped-query self-attention with rotary positions.

B batch  T query position  D embed  N query heads  K key/value heads
G query heads per key/value head  H head dim  E experts  M tokens  X = N x H

The experts are of query heads, so that E = G; all B x T tokens are M.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config.attention import GroupedQuery
from moejax.config.model import Model
from moejax.models.attend import KEYS, QUERIES, Context, KVCache, attend, attend_cached
from moejax.models.moe.router_counts import RouterCounts, count_probabilities
from moejax.models.norms import RMSNorm, inner_norm, unit_rms
from moejax.models.products import Operand, exact_product, operand, product
from moejax.models.remat import keep
from moejax.models.rotary import rotate
from moejax.models.weights import residual_gain, weight
from moejax.partitioning import Partitioner


class GroupedQueryLayer(nnx.Module):
  """Grouped-query attention (arXiv 2305.13245), optionally with QK-norm (arXiv 2302.05442) and with a router over
  attention experts (MoA, arXiv 2404.05567, equations 7 and 8), of which expert e is the e-th query head of each
  key/value head."""

  def __init__(self, config: GroupedQuery, model: Model, partitioner: Partitioner, rngs: nnx.Rngs):
    D, N, K, H = model.d_model, model.num_heads, model.num_kv_heads, model.head_dim
    self.w_q_DNH = weight(rngs, (D, N, H), ("embed", "heads", "head_dim"), fan_in=D)
    self.w_k_DKH = weight(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), fan_in=D)
    self.w_v_DKH = weight(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), fan_in=D)
    self.w_out_NHD = weight(
      rngs, (N, H, D), ("heads", "head_dim", "embed"), fan_in=N * H, gain=residual_gain(model.num_layers)
    )
    biased = model.attention_bias
    self.b_q_NH = nnx.Param(jnp.zeros((N, H)), names=("heads", "head_dim")) if biased else None
    self.b_k_KH = nnx.Param(jnp.zeros((K, H)), names=("kv_heads", "head_dim")) if biased else None
    self.b_v_KH = nnx.Param(jnp.zeros((K, H)), names=("kv_heads", "head_dim")) if biased else None
    self.b_out_D = nnx.Param(jnp.zeros((D,)), names=("embed",)) if config.output_bias else None
    self.sinks_N = nnx.Param(jnp.zeros((N,)), names=("heads",)) if config.sinks else None
    of_queries, of_keys = model.qk_norm_widths
    self.q_norm = inner_norm(model, of_queries) if model.qk_norm else None
    self.k_norm = inner_norm(model, of_keys) if model.qk_norm else None
    E = model.attention_experts
    self.w_router_DE = weight(rngs, (D, E), (None, None), fan_in=D) if E else None
    self.config = config
    self.rotary = config.rotary(model)
    self.epsilon = model.norm_epsilon
    self.group_size = model.moe.group_size if model.moe else None  # of whose tokens counts are sums
    self.gradients, self.bits = model.gradient_dtype, model.precision.attention
    self.partitioner = partitioner

  def __call__(
    self, x_BTD: jax.Array, context: Context, cache: KVCache | None = None
  ) -> tuple[jax.Array, RouterCounts | None, KVCache | None]:
    """Returns out_BTD, the counts of the router over heads if there is one, and `cache` extended by the tokens.

    Args:
      x_BTD: normalized input.
      context: segments and rotary angles of the tokens.
      cache: keys and values of earlier tokens. With None, the tokens attend only to each other.
    """
    T = x_BTD.shape[1]
    constrain = self.partitioner.constrain
    on_tpu = self.partitioner.platform == "tpu"
    apart = on_tpu or self.partitioner.shards("sequence") > 1
    with jax.named_scope("qkv"):
      q_BTNH = _biased(project(x_BTD, self._operand(self.w_q_DNH, x_BTD), apart), self.b_q_NH)
      k_BTKH = _biased(project(x_BTD, self._operand(self.w_k_DKH, x_BTD), apart), self.b_k_KH)
      v_BTKH = _biased(project(x_BTD, self._operand(self.w_v_DKH, x_BTD), apart), self.b_v_KH)
      v_BTKH = keep(v_BTKH, "keys_values")
      # The backward pass of a norm reads its input. What comes after it is computed again from that.
      has_norm = self.q_norm is not None or self.config.norm_after_rotary
      if has_norm:
        q_BTNH, k_BTKH = keep(q_BTNH, "queries"), keep(k_BTKH, "keys_values")
      if self.q_norm and self.k_norm:
        q_BTNH, k_BTKH = _normed(q_BTNH, self.q_norm), _normed(k_BTKH, self.k_norm)
      if self.rotary is not None:
        angles = context.angles[self.rotary]
        q_BTNH, k_BTKH = rotate(q_BTNH, angles, by_product=on_tpu), rotate(k_BTKH, angles, by_product=on_tpu)
      if self.config.norm_after_rotary:
        q_BTNH, k_BTKH = unit_rms(q_BTNH, self.epsilon), unit_rms(k_BTKH, self.epsilon)
      if self.config.score_scale != 1.0:
        q_BTNH = q_BTNH * self.config.score_scale
      if self.config.score_log_scale:
        q_BTNH = (q_BTNH * _log_factors(self.config, context.positions_BT)).astype(q_BTNH.dtype)
      q_BTNH, k_BTKH = constrain(q_BTNH, *QUERIES), constrain(k_BTKH, *KEYS)
      if not has_norm:
        q_BTNH, k_BTKH = keep(q_BTNH, "queries"), keep(k_BTKH, "keys_values")
    with jax.named_scope("attention"):
      config, sinks_N = self.config, None if self.sinks_N is None else self.sinks_N[...]
      if cache is None:
        segments_BT = _chunks(context, config.chunk)
        # Tokens of one chunk are fewer positions apart than its length, so that kernels can skip blocks.
        limit = config.window or config.chunk
        window = limit if limit and limit < T else None
        out_BTNH = attend(self.partitioner, q_BTNH, k_BTKH, v_BTKH, segments_BT, window, sinks_N)
      else:
        new = {"k": k_BTKH, "v": v_BTKH}
        out_BTNH, cache = attend_cached(
          self.partitioner, q_BTNH, new, cache, context.positions_BT, _keys_and_values,
          window=config.window, chunk=config.chunk, sinks_N=sinks_N,
        )  # fmt: skip
    counted = None
    if self.w_router_DE is not None:
      with jax.named_scope("attention_router"):
        probs_BTE = self._route(x_BTD)
        valid_BT = context.segments_BT > 0
        unit = self.group_size or T
        of_units = (1, x_BTD.shape[0] * T // unit, unit)
        counted = count_probabilities(probs_BTE.reshape(*of_units, -1), valid_BT.reshape(of_units), T)
        counted = {name: constrain(x, None, "batch", *(None,) * (x.ndim - 2)) for name, x in counted.items()}
        weights_BTN = jnp.tile(probs_BTE, self.w_k_DKH.shape[1]).astype(x_BTD.dtype)  # heads lie as [K, G]
        out_BTNH = out_BTNH * weights_BTN[..., None]
    with jax.named_scope("attention_out"):
      out_BTD = keep(join(out_BTNH, self._operand(self.w_out_NHD, x_BTD), apart), "attention_out")
      if self.b_out_D is not None:
        out_BTD = out_BTD + self.b_out_D[...].astype(out_BTD.dtype)[None, None]
    return constrain(out_BTD, "batch", "sequence", "act_embed"), counted, cache

  def _operand(self, weight: nnx.Param, x: jax.Array) -> Operand:
    return operand(weight[...], x.dtype, self.gradients, self.bits)

  def _route(self, x_BTD: jax.Array) -> jax.Array:
    """Returns probs_BTE in float32. They are not renormalized, since all experts run."""
    assert self.w_router_DE is not None
    logits_BTE = exact_product("BTD,DE->BTE", x_BTD.astype(jnp.float32), self.w_router_DE[...])
    return jax.nn.softmax(self.partitioner.constrain(logits_BTE, "batch", "sequence", None), axis=-1)


def _keys_and_values(cache: KVCache) -> tuple[jax.Array, jax.Array]:
  return cache["k"], cache["v"]


def _chunks(context: Context, chunk: int | None) -> jax.Array:
  """The number of the document of each token or, with chunks, a number of its chunk."""
  T = context.segments_BT.shape[1]
  if chunk is None or chunk >= T:
    return context.segments_BT
  return context.segments_BT * -(-T // chunk) + context.positions_BT // chunk


def _log_factors(config: GroupedQuery, positions_BT: jax.Array) -> jax.Array:
  """The factor of the scores of each query, [B, T, 1, 1] in float32 (`GroupedQuery.score_log_scale`)."""
  lengths_BT = ((positions_BT + 1) // config.score_log_length).astype(jnp.float32)
  return (1.0 + config.score_log_scale * jnp.log1p(lengths_BT))[..., None, None]


def project(x_BTD: jax.Array, w_DNH: Operand, apart: bool) -> jax.Array:
  """Returns x_BTNH.

  On TPU the product has separate dimensions of tokens and heads (`apart`), so that it writes the layout that the
  attention kernel reads; so it has where sequences are sharded, which cannot be flattened. Elsewhere it is a product of
  matrices, whose backward pass takes half as long on CPU.
  """
  if apart:
    return product("BTD,DNH->BTNH", x_BTD, w_DNH)
  (B, T, D), (_, N, H) = x_BTD.shape, w_DNH.shape
  w_DX = jax.tree.map(lambda w: w.reshape(D, N * H), w_DNH)
  return product("MD,DX->MX", x_BTD.reshape(B * T, D), w_DX).reshape(B, T, N, H)


def _biased(x_BTNH: jax.Array, bias_NH: nnx.Param | None) -> jax.Array:
  return x_BTNH if bias_NH is None else x_BTNH + bias_NH[...].astype(x_BTNH.dtype)[None, None]


def _normed(x_BTNH: jax.Array, norm: RMSNorm) -> jax.Array:
  """Queries or keys, normalized over each head, or over all heads of a token where the scale is that long."""
  if norm.scale_D.shape == x_BTNH.shape[-1:]:
    return norm(x_BTNH)
  return norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape)


def join(x_BTNH: jax.Array, w_NHD: Operand, apart: bool) -> jax.Array:
  """Returns x_BTD, the inverse of `project`, in two forms for the same reasons."""
  if apart:
    return product("BTNH,NHD->BTD", x_BTNH, w_NHD)
  (B, T, N, H), D = x_BTNH.shape, w_NHD.shape[-1]
  w_XD = jax.tree.map(lambda w: w.reshape(N * H, D), w_NHD)
  return product("MX,XD->MD", x_BTNH.reshape(B * T, N * H), w_XD).reshape(B, T, D)
