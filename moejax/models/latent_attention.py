"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

B batch  T query position  D embed  N query heads  H head dim  X = kv_rank or q_rank
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config.attention import Latent
from moejax.config.model import Model
from moejax.models.attend import QUERIES, Context, KVCache, attend, attend_cached
from moejax.models.attention import join
from moejax.models.norms import inner_norm
from moejax.models.products import Operand, operand, product
from moejax.models.remat import keep
from moejax.models.rotary import rotate
from moejax.models.weights import residual_gain, weight
from moejax.partitioning import Partitioner


class LatentLayer(nnx.Module):
  """Queries, keys and values from narrow vectors. A part of each query and key has a rotary embedding."""

  def __init__(self, config: Latent, model: Model, partitioner: Partitioner, rngs: nnx.Rngs):
    D, N, H, R, P = model.d_model, model.num_heads, model.head_dim, config.kv_rank, config.rotary_dim
    values, of_heads = config.values(model), ("heads", "head_dim")
    if config.q_rank is None:
      self.w_q_DNH = weight(rngs, (D, N, H + P), ("embed", *of_heads), fan_in=D)
    else:
      self.w_q_down_DX = weight(rngs, (D, config.q_rank), ("embed", None), fan_in=D)
      self.q_norm = inner_norm(model, config.q_rank)
      self.w_q_up_XNH = weight(rngs, (config.q_rank, N, H + P), (None, *of_heads), fan_in=config.q_rank)
    self.w_kv_down_DX = weight(rngs, (D, R + P), ("embed", None), fan_in=D)
    self.kv_norm = inner_norm(model, R)
    self.w_kv_up_XNH = weight(rngs, (R, N, H + values), (None, *of_heads), fan_in=R)
    self.w_out_NHD = weight(
      rngs, (N, values, D), (*of_heads, "embed"), fan_in=N * values, gain=residual_gain(model.num_layers)
    )
    self.config = config
    self.rotary = config.rotary(model)
    self.head_dim = H
    self.gradients, self.bits = model.gradient_dtype, model.precision.attention
    self.partitioner = partitioner

  def __call__(
    self, x_BTD: jax.Array, context: Context, cache: KVCache | None = None
  ) -> tuple[jax.Array, None, KVCache | None]:
    """Returns out_BTD and `cache` extended by the tokens.

    Args:
      x_BTD: normalized input.
      context: segments and rotary angles of the tokens.
      cache: the narrow vectors and rotated keys of earlier tokens. With None, the tokens attend only to each other.
    """
    on_tpu = self.partitioner.platform == "tpu"
    apart = on_tpu or self.partitioner.shards("sequence") > 1
    angles = context.angles[self.rotary]
    with jax.named_scope("qkv"):
      q_BTNH = self.partitioner.constrain(self._queries(x_BTD), *QUERIES)
      if self.config.score_scale != 1.0:
        q_BTNH = q_BTNH * self.config.score_scale
      plain_BTNH, rotated_BTNH = jnp.split(q_BTNH, [self.head_dim], axis=-1)
      rotated_BTNH = rotate(rotated_BTNH, angles, by_product=on_tpu)
      narrow_BTX = product("BTD,DX->BTX", x_BTD, self._operand(self.w_kv_down_DX, x_BTD))
      narrow_BTX, key_BTX = jnp.split(narrow_BTX, [self.config.kv_rank], axis=-1)
      narrow_BTX = self.kv_norm(narrow_BTX)
      key_BT1X = rotate(key_BTX[:, :, None], angles, by_product=on_tpu)
    if cache is None:
      out_BTNH = self._attend(plain_BTNH, rotated_BTNH, narrow_BTX, key_BT1X, context)
    else:
      out_BTNH, cache = self._attend_cached(plain_BTNH, rotated_BTNH, narrow_BTX, key_BT1X, context, cache)
    with jax.named_scope("attention_out"):
      out_BTD = keep(join(out_BTNH, self._operand(self.w_out_NHD, x_BTD), apart), "attention_out")
    return self.partitioner.constrain(out_BTD, "batch", "sequence", "act_embed"), None, cache

  def _queries(self, x_BTD: jax.Array) -> jax.Array:
    if self.config.q_rank is None:
      return product("BTD,DNH->BTNH", x_BTD, self._operand(self.w_q_DNH, x_BTD))
    narrow_BTX = self.q_norm(product("BTD,DX->BTX", x_BTD, self._operand(self.w_q_down_DX, x_BTD)))
    return product("BTX,XNH->BTNH", narrow_BTX, self._operand(self.w_q_up_XNH, x_BTD))

  def _attend(
    self, plain_BTNH: jax.Array, rotated_BTNH: jax.Array, narrow_BTX: jax.Array, key_BT1X: jax.Array, context: Context
  ) -> jax.Array:
    """Returns out_BTNH with whole keys and values of every head."""
    constrain = self.partitioner.constrain
    with jax.named_scope("qkv"):
      both_BTNH = product("BTX,XNH->BTNH", narrow_BTX, self._operand(self.w_kv_up_XNH, narrow_BTX))
      k_BTNH, v_BTNH = jnp.split(constrain(both_BTNH, *QUERIES), [self.head_dim], axis=-1)
      shared_BTNH = jnp.broadcast_to(key_BT1X, rotated_BTNH.shape)
      q_BTNH = keep(jnp.concatenate([plain_BTNH, rotated_BTNH], axis=-1), "queries")
      k_BTNH = keep(jnp.concatenate([k_BTNH, shared_BTNH], axis=-1), "keys_values")
      v_BTNH = keep(v_BTNH, "keys_values")
    with jax.named_scope("attention"):
      return attend(self.partitioner, q_BTNH, k_BTNH, v_BTNH, context.segments_BT)

  def _attend_cached(
    self,
    plain_BTNH: jax.Array,
    rotated_BTNH: jax.Array,
    narrow_BTX: jax.Array,
    key_BT1X: jax.Array,
    context: Context,
    cache: KVCache,
  ) -> tuple[jax.Array, KVCache]:
    """Returns out_BTNH with queries that are multiplied by the matrices of keys, so that they attend to the narrow
    vectors, which are the only key and value of all heads."""
    R, H = self.config.kv_rank, self.head_dim
    up = self._operand(self.w_kv_up_XNH, narrow_BTX).value
    into_keys_XNH, into_values_XNH = up[..., :H], up[..., H:]
    with jax.named_scope("attention"):
      narrow_BTNX = jnp.einsum("BTNH,XNH->BTNX", plain_BTNH, into_keys_XNH)
      # The scores of a head are scaled by the width of its queries, the kernel by that of the vectors.
      scale = ((R + self.config.rotary_dim) / (H + self.config.rotary_dim)) ** 0.5
      q_BTNX = jnp.concatenate([narrow_BTNX, rotated_BTNH], axis=-1) * scale
      new = {"latent": jnp.concatenate([narrow_BTX[:, :, None], key_BT1X], axis=-1)}
      out_BTNX, cache = attend_cached(
        self.partitioner,
        q_BTNX,
        new,
        cache,
        context.positions_BT,
        lambda kept: (kept["latent"], kept["latent"][..., :R]),
      )
      return jnp.einsum("BTNX,XNH->BTNH", out_BTNX, into_values_XNH), cache

  def _operand(self, weight: nnx.Param, x: jax.Array) -> Operand:
    return operand(weight[...], x.dtype, self.gradients, self.bits)
