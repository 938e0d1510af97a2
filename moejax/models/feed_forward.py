"""The dense feed-forward layer: of dense layers, and of experts that all tokens share.

B batch  T position  D embed  F hidden  M = B x T tokens
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config.model import Model
from moejax.models.layers import activate, keep, residual_gain, weight
from moejax.partitioning import Partitioner


class FeedForward(nnx.Module):
  """x_BTD to x_BTD through one hidden layer of `width`."""

  def __init__(self, model: Model, width: int, partitioner: Partitioner, rngs: nnx.Rngs):
    D, F = model.d_model, width
    self.w_gate_DF = weight(rngs, (D, F), ("embed", "mlp"), fan_in=D) if model.activation == "swiglu" else None
    self.w_up_DF = weight(rngs, (D, F), ("embed", "mlp"), fan_in=D)
    self.w_down_FD = weight(rngs, (F, D), ("mlp", "embed"), fan_in=F, gain=residual_gain(model.num_layers))
    self.partitioner = partitioner

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    B, T, D = x_BTD.shape
    place, dtype = self.partitioner.constrain, x_BTD.dtype
    with jax.named_scope("feed_forward"):
      x_MD = x_BTD.reshape(-1, D)  # flattened: twice as fast backwards on CPU
      gate_MF = None
      if self.w_gate_DF is not None:
        gate_MF = keep(jnp.einsum("MD,DF->MF", x_MD, self.w_gate_DF[...].astype(dtype)))
      up_MF = keep(jnp.einsum("MD,DF->MF", x_MD, self.w_up_DF[...].astype(dtype)))
      hidden_MF = place(activate(gate_MF, up_MF), "batch", "mlp")
      out_MD = keep(jnp.einsum("MF,FD->MD", hidden_MF, self.w_down_FD[...].astype(dtype)))
      return place(out_MD.reshape(B, T, D), "batch", "sequence", "act_embed")
