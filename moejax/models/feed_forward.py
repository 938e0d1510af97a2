"""The feed-forward layers of dense layers, and of experts that all tokens share.

B batch  T query position  D embed  F hidden  M tokens
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config.feed_forward import MLP, FeedForward
from moejax.config.kinds import described, function_of, running
from moejax.config.model import Model
from moejax.errors import UserError
from moejax.models.activations import activate
from moejax.models.products import Operand, operand, product
from moejax.models.remat import keep
from moejax.models.returned import check_returned, shown
from moejax.models.weights import residual_gain, weight
from moejax.partitioning import Partitioner


class MLPLayer(nnx.Module):
  """x_BTD to x_BTD through one hidden layer of `width`."""

  def __init__(self, model: Model, width: int, partitioner: Partitioner, rngs: nnx.Rngs):
    D, F = model.d_model, width
    self.w_gate_DF = weight(rngs, (D, F), ("embed", "mlp"), fan_in=D) if model.is_gated else None
    self.w_up_DF = weight(rngs, (D, F), ("embed", "mlp"), fan_in=D)
    self.w_down_FD = weight(rngs, (F, D), ("mlp", "embed"), fan_in=F, gain=residual_gain(model.num_layers))
    self.activation = model.activation
    self.gradients, self.bits = model.gradient_dtype, model.precision.feed_forward
    self.partitioner = partitioner

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    B, T, D = x_BTD.shape
    constrain, dtype = self.partitioner.constrain, x_BTD.dtype
    if self.partitioner.shards("sequence") > 1:
      return self._of_sharded_sequences(x_BTD)
    with jax.named_scope("feed_forward"):
      x_MD = x_BTD.reshape(-1, D)  # flattened: twice as fast backwards on CPU
      gate_MF = None
      if self.w_gate_DF is not None:
        gate_MF = keep(product("MD,DF->MF", x_MD, self._operand(self.w_gate_DF, dtype)), "feed_forward_in")
      up_MF = keep(product("MD,DF->MF", x_MD, self._operand(self.w_up_DF, dtype)), "feed_forward_in")
      hidden_MF = constrain(activate(self.activation, gate_MF, up_MF), "batch", "mlp")
      out_MD = keep(product("MF,FD->MD", hidden_MF, self._operand(self.w_down_FD, dtype)), "feed_forward_out")
      return constrain(out_MD.reshape(B, T, D), "batch", "sequence", "act_embed")

  def _of_sharded_sequences(self, x_BTD: jax.Array) -> jax.Array:
    """The same without flattened tokens, which cannot be sharded over batch and sequence."""
    constrain, dtype = self.partitioner.constrain, x_BTD.dtype
    with jax.named_scope("feed_forward"):
      gate_BTF = None
      if self.w_gate_DF is not None:
        gate_BTF = keep(product("BTD,DF->BTF", x_BTD, self._operand(self.w_gate_DF, dtype)), "feed_forward_in")
      up_BTF = keep(product("BTD,DF->BTF", x_BTD, self._operand(self.w_up_DF, dtype)), "feed_forward_in")
      hidden_BTF = constrain(activate(self.activation, gate_BTF, up_BTF), "batch", "sequence", "mlp")
      out_BTD = keep(product("BTF,FD->BTD", hidden_BTF, self._operand(self.w_down_FD, dtype)), "feed_forward_out")
      return constrain(out_BTD, "batch", "sequence", "act_embed")

  def _operand(self, weight: nnx.Param, dtype: jnp.dtype) -> Operand:
    return operand(weight[...], dtype, self.gradients, self.bits)


def mlp(config: MLP, model: Model, partitioner: Partitioner, rngs: nnx.Rngs) -> MLPLayer:
  """The MLP of dense layers."""
  return MLPLayer(model, model.d_ff, partitioner, rngs)


MakeLayer = Callable[[Any, Model, Partitioner, nnx.Rngs], nnx.Module]
"""Maps (configuration of the layer, model, partitioner, random keys) to a module that computes x_BTD from the
normalized x_BTD. The residual stream is added outside."""

FEED_FORWARDS: dict[type[FeedForward], MakeLayer] = {MLP: mlp}
"""Layers by class of the configuration. Custom layers are added to it."""


def feed_forward(model: Model, partitioner: Partitioner, rngs: nnx.Rngs) -> Any:
  """The feed-forward layer of a dense layer.

  Raises:
    UserError: If FEED_FORWARDS has no function for it, or the parameters of its module are not those it declares.
  """
  config = model.feed_forward
  make = function_of(config, FEED_FORWARDS)
  with running(config):
    layer = make(config, model, partitioner, rngs)
  if not isinstance(layer, nnx.Module):
    raise UserError(f"{described(type(config))} returned {shown(layer)}, not a flax.nnx.Module")
  declared = config.shapes(model.d_model, model.d_ff, model.is_gated).values()
  shapes = sorted(tuple(sorted(shape.values())) for shape in declared)
  found = sorted(tuple(sorted(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))
  if shapes != found:
    raise UserError(f"{described(type(config))} declares parameters of shapes {shapes}, but its module has {found}")
  return layer


def apply_feed_forward(config: FeedForward, layer: Callable[[jax.Array], jax.Array], x_BTD: jax.Array) -> jax.Array:
  """The output of a feed-forward layer, x_BTD.

  Raises:
    UserError: If the layer returns an array of another shape or dtype than its input has.
  """
  with running(config):
    out_BTD = layer(x_BTD)
  check_returned(config, "x_BTD", out_BTD, x_BTD.shape, x_BTD.dtype)
  return out_BTD
