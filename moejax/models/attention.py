"""Grouped-query self-attention with rotary positions.

B batch  T position  D embed  N query heads  K key/value heads  G query heads per key/value head  H head dim
E experts of heads (E = G)  M = B x T tokens  X = N x H
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moejax.config.model import Model
from moejax.kernels.attention import ATTENTION, attention, attention_for
from moejax.kernels.cached_attention import cached_attention
from moejax.models.layers import Context, Memory, RMSNorm, residual_gain, rotate, weight
from moejax.models.moe.balance import Tally, tally
from moejax.partitioning import Partitioner


class Attention(nnx.Module):
  """x_BTD to x_BTD (arXiv 2305.13245), optionally with QK-norm (arXiv 2302.05442) and with a router over experts of
  heads (MoA, arXiv 2404.05567, equations 7 and 8): expert e is the e-th query head of every key/value head."""

  def __init__(self, model: Model, partitioner: Partitioner, rngs: nnx.Rngs):
    D, N, K, H = model.d_model, model.num_heads, model.num_kv_heads, model.head_dim
    self.w_q_DNH = weight(rngs, (D, N, H), ("embed", "heads", "head_dim"), fan_in=D)
    self.w_k_DKH = weight(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), fan_in=D)
    self.w_v_DKH = weight(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), fan_in=D)
    self.w_out_NHD = weight(
      rngs, (N, H, D), ("heads", "head_dim", "embed"), fan_in=N * H, gain=residual_gain(model.num_layers)
    )
    self.q_norm = RMSNorm(H, model.norm_epsilon, None) if model.qk_norm else None
    self.k_norm = RMSNorm(H, model.norm_epsilon, None) if model.qk_norm else None
    E = model.attention_experts
    self.w_router_DE = weight(rngs, (D, E), (None, None), fan_in=D) if E else None
    self.partitioner = partitioner

  def __call__(
    self, x_BTD: jax.Array, context: Context, memory: Memory | None = None
  ) -> tuple[jax.Array, Tally | None, Memory | None]:
    """out_BTD, what the router over heads counts, None where there is none, and `memory` with the tokens.

    Args:
      x_BTD: normalised input.
      context: of the tokens.
      memory: of the tokens before these; None has none, and keeps none.
    """
    T = x_BTD.shape[1]
    place = self.partitioner.constrain
    on_tpu = self.partitioner.platform == "tpu"
    with jax.named_scope("qkv"):
      q_BTNH = _project(x_BTD, self.w_q_DNH[...], on_tpu)
      k_BTKH = _project(x_BTD, self.w_k_DKH[...], on_tpu)
      v_BTKH = checkpoint_name(_project(x_BTD, self.w_v_DKH[...], on_tpu), ATTENTION)
      if self.q_norm and self.k_norm:
        q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
      q_BTNH = place(rotate(q_BTNH, context.angles, by_product=on_tpu), "batch", "sequence", "heads", "head_dim")
      k_BTKH = place(rotate(k_BTKH, context.angles, by_product=on_tpu), "batch", "sequence", "kv_heads", "head_dim")
      q_BTNH, k_BTKH = checkpoint_name(q_BTNH, ATTENTION), checkpoint_name(k_BTKH, ATTENTION)
    with jax.named_scope("attention"):
      query, key = ("batch", "sequence", "heads", "head_dim"), ("batch", "sequence", "kv_heads", "head_dim")
      if memory is None:
        best = attention_for(self.partitioner.platform, T)
        attend = self.partitioner.on_each_device(
          best, (query, key, key, ("batch", "sequence")), query, exchanging=best is not attention
        )
        out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, context.segments_BT)
      else:
        slots = ("batch", None, "kv_heads", "head_dim")
        inputs = (query, key, key, slots, slots, ("batch", "sequence"))
        attend = self.partitioner.on_each_device(cached_attention, inputs, (query, slots, slots))
        out_BTNH, k_BSKH, v_BSKH = attend(q_BTNH, k_BTKH, v_BTKH, *memory, context.positions_BT)
        memory = Memory(k_BSKH, v_BSKH)
    counted = None
    if self.w_router_DE is not None:
      with jax.named_scope("attention_router"):
        probs_BTE = self._route(x_BTD)
        counted = tally(probs_BTE[None], (context.segments_BT > 0)[None], T)
        counted = {name: place(x, None, "batch", *(None,) * (x.ndim - 2)) for name, x in counted.items()}
        weights_BTN = jnp.tile(probs_BTE, self.w_k_DKH.shape[1]).astype(x_BTD.dtype)  # heads lie as [K, G]
        out_BTNH = out_BTNH * weights_BTN[..., None]
    with jax.named_scope("attention_out"):
      out_BTD = checkpoint_name(_join(out_BTNH, self.w_out_NHD[...], on_tpu), ATTENTION)
    return place(out_BTD, "batch", "sequence", "act_embed"), counted, memory

  def _route(self, x_BTD: jax.Array) -> jax.Array:
    """probs_BTE in float32, not renormalised over any choice: all experts run."""
    assert self.w_router_DE is not None
    logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), self.w_router_DE[...])
    return jax.nn.softmax(self.partitioner.constrain(logits_BTE, "batch", "sequence", None), axis=-1)


def _project(x_BTD: jax.Array, w_DNH: jax.Array, on_tpu: bool) -> jax.Array:
  """x_BTNH.

  On TPU the product over separate heads writes the layout of the attention kernel itself; flattened it would be copied
  there and back. Elsewhere both sides are matrices: on CPU the backward products of the other take twice as long.
  """
  w_DNH = w_DNH.astype(x_BTD.dtype)
  if on_tpu:
    return jnp.einsum("BTD,DNH->BTNH", x_BTD, w_DNH)
  (B, T, D), (_, N, H) = x_BTD.shape, w_DNH.shape
  return jnp.einsum("MD,DX->MX", x_BTD.reshape(B * T, D), w_DNH.reshape(D, N * H)).reshape(B, T, N, H)


def _join(x_BTNH: jax.Array, w_NHD: jax.Array, on_tpu: bool) -> jax.Array:
  """x_BTD, the way back, in two forms for the same reasons."""
  w_NHD = w_NHD.astype(x_BTNH.dtype)
  if on_tpu:
    return jnp.einsum("BTNH,NHD->BTD", x_BTNH, w_NHD)
  (B, T, N, H), D = x_BTNH.shape, w_NHD.shape[-1]
  return jnp.einsum("MX,XD->MD", x_BTNH.reshape(B * T, N * H), w_NHD.reshape(N * H, D)).reshape(B, T, D)
