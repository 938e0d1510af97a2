"""A sparse feed-forward layer: router, dispatch, experts.

B batch  T query position  D embed  O outer batch  U routing groups  M tokens  E experts
A experts per token
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config.model import Model
from moejax.config.remat import ROUTER
from moejax.models.feed_forward import MLPLayer
from moejax.models.moe.dispatch import dispatch
from moejax.models.moe.experts import Experts
from moejax.models.moe.router import route
from moejax.models.moe.router_counts import RouterCounts, count_choices, count_probabilities
from moejax.models.moe.routers.scores import probabilities
from moejax.models.moe.routing import TOKENS, RouterContext, Routing
from moejax.models.products import exact_product, operand, product
from moejax.models.remat import keep
from moejax.models.weights import weight
from moejax.partitioning import Partitioner

BIAS = "bias_E"
"""Name of a router's bias among the layer's parameters."""


class MoELayer(nnx.Module):
  """Applies to each token the experts that it is routed to, and the experts that all tokens share."""

  def __init__(self, model: Model, partitioner: Partitioner, rngs: nnx.Rngs):
    assert model.moe
    D, E, shared = model.d_model, model.moe.num_experts, model.moe.num_shared_experts
    # Replicated, as in Table 1 of arXiv 2405.15052: every device routes its own tokens.
    self.w_router_DE = weight(rngs, (D, E), (None, None), fan_in=D)
    self.b_router_E = nnx.Param(jnp.zeros((E,)), names=(None,)) if model.moe.bias else None
    self.bias_E = nnx.Param(jnp.zeros((E,)), names=(None,)) if model.moe.router.bias_rate else None
    self.experts = Experts(model, partitioner, rngs)
    self.shared = MLPLayer(model, shared * model.moe.d_ff, partitioner, rngs) if shared else None
    self.w_shared_gate_D1 = weight(rngs, (D, 1), ("embed", None), fan_in=D) if model.moe.shared_gate else None
    self.gradients = model.gradient_dtype
    self.moe = model.moe
    self.partitioner = partitioner

  def __call__(
    self, x_BTD: jax.Array, valid_BT: jax.Array, keys_B: jax.Array | None = None, onto_BTD: jax.Array | None = None
  ) -> tuple[jax.Array, RouterCounts]:
    """Returns out_BTD and the counts of its router.

    Args:
      x_BTD: normalized input.
      valid_BT: False for padding, which takes no capacity and is not counted in losses.
      keys_B: random keys of the sequences, for the router's noise in training; None has no noise.
      onto_BTD: the residual stream, to which the output is added. None returns the output alone.
    """
    moe, constrain = self.moe, self.partitioner.constrain
    # The groups do not depend on the mesh. O only splits them among data shards.
    O, T, D = self.partitioner.shards("outer"), *x_BTD.shape[1:]
    x_OUMD = x_BTD.reshape(O, -1, moe.group_tokens(T), D)
    x_OUMD = constrain(x_OUMD, "outer", "groups", "group_tokens", "act_embed")
    valid_OUM = constrain(valid_BT.reshape(x_OUMD.shape[:3]), "outer", "groups", "group_tokens")
    with jax.named_scope("router"):
      logits_OUME = self._logits(x_OUMD, keys_B)
      bias_E = None if self.bias_E is None else self.bias_E[...]
      context = RouterContext(moe, valid_OUM, self.partitioner, bias_E, keys_B)
      routing = route(moe.router, logits_OUME, context)
      probs_OUME = probabilities(logits_OUME, moe.router)
      sent_OUMD, sent = (x_OUMD, routing) if moe.weights_on == "outputs" else _weighted(x_OUMD, routing)
    out_OUMD, dropped_OU = dispatch(sent_OUMD, sent, self.experts, moe, self.partitioner)
    if onto_BTD is not None:
      # In the shape of the groups: XLA for TPU then fuses the sum with the product that computes out_OUMD.
      out_OUMD = constrain(onto_BTD.reshape(out_OUMD.shape) + out_OUMD, "outer", "groups", "group_tokens", "act_embed")
    with jax.named_scope("router"):
      counted = count_probabilities(probs_OUME, valid_OUM, T) | count_choices(
        logits_OUME, routing, valid_OUM, dropped_OU, T
      )
      counted = {name: constrain(x, "outer", "groups", *(None,) * (x.ndim - 2)) for name, x in counted.items()}
    out_BTD = constrain(out_OUMD.reshape(x_BTD.shape), "batch", "sequence", "act_embed")
    if self.shared is not None:
      with jax.named_scope("shared_experts"):
        out_BTD = out_BTD + self._gate(x_BTD) * self.shared(x_BTD)
    return out_BTD, counted

  def _gate(self, x_BTD: jax.Array) -> jax.Array | float:
    """Weight of the shared experts in the output of each token."""
    if self.w_shared_gate_D1 is None:
      return 1.0
    held = operand(self.w_shared_gate_D1[...], x_BTD.dtype, self.gradients)
    return jax.nn.sigmoid(product("BTD,DX->BTX", x_BTD, held))

  def _logits(self, x_OUMD: jax.Array, keys_B: jax.Array | None) -> jax.Array:
    """Logits in float32. In bfloat16 there would be ties, which decide which tokens are dropped."""
    x_OUMD = x_OUMD.astype(jnp.float32)
    if keys_B is not None and self.moe.router.jitter:
      x_OUMD = x_OUMD * _jitter(keys_B, x_OUMD.shape, self.moe.router.jitter)
    logits_OUME = exact_product("OUMD,DE->OUME", x_OUMD, self.w_router_DE[...])
    if self.b_router_E is not None:
      logits_OUME = logits_OUME + self.b_router_E[...].reshape(1, 1, 1, -1)
    return keep(self.partitioner.constrain(logits_OUME, *TOKENS), ROUTER)


def _weighted(x_OUMD: jax.Array, routing: Routing) -> tuple[jax.Array, Routing]:
  """The input of each token times the weight of its only choice, and the routing with weights of 1."""
  weighted_OUMD = (x_OUMD * routing.weights_OUMA).astype(x_OUMD.dtype)
  return weighted_OUMD, dataclasses.replace(routing, weights_OUMA=routing.chosen_OUMA.astype(jnp.float32))


def _jitter(keys_B: jax.Array, shape: tuple[int, ...], amount: float) -> jax.Array:
  """Random factors from 1 - amount to 1 + amount. They depend on the key of the sequence alone, not on its batch."""
  of_sequence = (math.prod(shape[:3]) // len(keys_B), shape[-1])

  def factors(key: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, 1), of_sequence, minval=1 - amount, maxval=1 + amount)

  return jax.vmap(factors)(keys_B).reshape(shape)
