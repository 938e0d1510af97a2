"""The experts' own feed-forward layers, stacked.

O outer batch  U routing groups  C capacity  D embed  F hidden of one expert  E experts
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config.model import Model
from moejax.models.layers import residual_gain, weight
from moejax.partitioning import Partitioner


class Experts(nnx.Module):
  """E SwiGLU layers, each on its own rows (arXiv 2002.05202)."""

  def __init__(self, model: Model, partitioner: Partitioner, rngs: nnx.Rngs):
    assert model.moe
    E, D, F = model.moe.num_experts, model.d_model, model.moe.d_ff
    wide, narrow = ("experts", "expert_embed", "expert_mlp"), ("experts", "expert_mlp", "expert_embed")
    self.w_gate_EDF = weight(rngs, (E, D, F), wide, fan_in=D)
    self.w_up_EDF = weight(rngs, (E, D, F), wide, fan_in=D)
    self.w_down_EFD = weight(rngs, (E, F, D), narrow, fan_in=F, gain=residual_gain(model.num_layers))
    self.partitioner = partitioner

  def __call__(self, x_OEUCD: jax.Array) -> jax.Array:
    place, dtype = self.partitioner.constrain, x_OEUCD.dtype
    names = ("outer", "experts", None, "capacity")
    with jax.named_scope("experts"):
      gate_OEUCF = jnp.einsum("OEUCD,EDF->OEUCF", x_OEUCD, self.w_gate_EDF[...].astype(dtype))
      up_OEUCF = jnp.einsum("OEUCD,EDF->OEUCF", x_OEUCD, self.w_up_EDF[...].astype(dtype))
      gate_OEUCF, up_OEUCF = place(gate_OEUCF, *names, "expert_mlp"), place(up_OEUCF, *names, "expert_mlp")
      hidden_OEUCF = place(jax.nn.silu(gate_OEUCF) * up_OEUCF, *names, "expert_mlp")
      out_OEUCD = jnp.einsum("OEUCF,EFD->OEUCD", hidden_OEUCF, self.w_down_EFD[...].astype(dtype))
      return place(out_OEUCD, *names, "act_embed")
