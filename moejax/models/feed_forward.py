"""The dense feed-forward layer: of dense layers, and of experts that all tokens share.

B batch  T position  D embed  F hidden  M = B x T tokens
"""

import jax
from flax import nnx

from moejax.config.model import Model
from moejax.models.activations import activate
from moejax.models.products import operand, product
from moejax.models.remat import keep
from moejax.models.weights import residual_gain, weight
from moejax.partitioning import Partitioner


class FeedForward(nnx.Module):
  """x_BTD to x_BTD through one hidden layer of `width`."""

  def __init__(self, model: Model, width: int, partitioner: Partitioner, rngs: nnx.Rngs):
    D, F = model.d_model, width
    self.w_gate_DF = weight(rngs, (D, F), ("embed", "mlp"), fan_in=D) if model.activation == "swiglu" else None
    self.w_up_DF = weight(rngs, (D, F), ("embed", "mlp"), fan_in=D)
    self.w_down_FD = weight(rngs, (F, D), ("mlp", "embed"), fan_in=F, gain=residual_gain(model.num_layers))
    self.gradients = model.gradient_dtype
    self.partitioner = partitioner

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    B, T, D = x_BTD.shape
    place, dtype = self.partitioner.constrain, x_BTD.dtype
    with jax.named_scope("feed_forward"):
      x_MD = x_BTD.reshape(-1, D)  # flattened: twice as fast backwards on CPU
      gate_MF = None
      if self.w_gate_DF is not None:
        gate_MF = keep(product("MD,DF->MF", x_MD, operand(self.w_gate_DF[...], dtype, self.gradients)))
      up_MF = keep(product("MD,DF->MF", x_MD, operand(self.w_up_DF[...], dtype, self.gradients)))
      hidden_MF = place(activate(gate_MF, up_MF), "batch", "mlp")
      out_MD = keep(product("MF,FD->MD", hidden_MF, operand(self.w_down_FD[...], dtype, self.gradients)))
      return place(out_MD.reshape(B, T, D), "batch", "sequence", "act_embed")
