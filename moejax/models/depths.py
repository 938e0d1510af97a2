"""Mixture of depths: a layer that only the chosen tokens of a sequence go through (arXiv 2404.02258 and 2410.14268).

The layer sees the chosen tokens as one shorter sequence with the same documents. Windows and chunks of attention count
chosen tokens, and rotary embeddings have the positions in the text. If its feed-forward layer is a mixture of experts,
only chosen tokens are routed to experts (staged MoDE, arXiv 2404.02258, section 4.3).

B batch  T query position  D embed  S key position  C capacity
X = other dimensions
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config.attention import Attention
from moejax.config.depths import Depths, ThresholdDepths, TopKDepths
from moejax.config.model import Model
from moejax.kernels.cached_attention import store
from moejax.models.attend import Context, KVCache
from moejax.models.block import Block
from moejax.models.moe.router_counts import CHOSEN, DEPTHS, EXPERTS, RouterCounts
from moejax.models.products import exact_product
from moejax.models.weights import weight
from moejax.partitioning import Partitioner

ROWS, FEATURES = ("batch", "sequence"), ("batch", "sequence", "act_embed")
THROUGH = "through"
"""Name of the cached array that has 1 for each earlier token that went through the layer."""


class Order(NamedTuple):
  """The tokens of each sequence with the chosen ones first, in the order of the text."""

  token_BC: jax.Array
  """The token of each slot, int32."""
  slot_BT: jax.Array
  """The slot of each token, int32, at least C if it has none."""
  taken_BC: jax.Array
  """Whether the token of a slot is chosen."""


class RoutedBlock(nnx.Module):
  """A layer that the chosen tokens go through. The others skip it by the residual stream."""

  def __init__(self, attention: Attention, model: Model, sparse: bool, partitioner: Partitioner, rngs: nnx.Rngs):
    D = model.d_model
    self.block = Block(attention, model, sparse, partitioner, rngs)
    self.w_router_DX = weight(rngs, (D, 1), (None, None), fan_in=D)
    predicts = model.depths.has_predictor
    self.w_predictor_DX = weight(rngs, (D, 1), (None, None), fan_in=D) if predicts else None
    self.b_predictor_X = nnx.Param(jnp.zeros((1,)), names=(None,)) if predicts else None
    self.depths, self.partitioner = model.depths, partitioner

  def __call__(
    self, x_BTD: jax.Array, context: Context, cache: KVCache | None, keys_B: jax.Array | None
  ) -> tuple[jax.Array, dict[str, RouterCounts], KVCache | None]:
    """Returns x_BTD, the counts of the routers over tokens and experts, and `cache` extended by the tokens."""
    of_block, before_B = cache, None
    if cache is not None:
      of_block = {name: array for name, array in cache.items() if name != THROUGH}
      before_B = jnp.sum(cache[THROUGH].astype(jnp.float32), axis=1).astype(jnp.int32)
    slots = self.depths.slots(x_BTD.shape[1])
    with jax.named_scope("depth_router"):
      valid_BT, logits_BT = context.segments_BT > 0, self._logits(x_BTD, self.w_router_DX)
      predicted_BT = self._predicted(x_BTD)
      chosen_BT, weight_BT = choose(self.depths, logits_BT, predicted_BT, valid_BT, slots)
      order = order_of(chosen_BT, slots)
      inner = self._inner(context, order, before_B)
      x_BCD = self._rows(collect)(x_BTD, order.token_BC, order.slot_BT)
    out_BCD, of_experts, of_block = self.block(x_BCD, inner, of_block, keys_B)
    with jax.named_scope("depth_router"):
      change_BCD = jnp.where(order.taken_BC[..., None], out_BCD - x_BCD, 0)
      change_BTD = self._rows(spread)(change_BCD, order.token_BC, order.slot_BT)
      x_BTD = x_BTD + (change_BTD.astype(jnp.float32) * weight_BT[..., None]).astype(x_BTD.dtype)
      x_BTD = self.partitioner.constrain(x_BTD, *FEATURES)
      counts = count_depths(self.depths, logits_BT, predicted_BT, chosen_BT, valid_BT, slots)
      counts = {name: self.partitioner.constrain(count_B, "batch") for name, count_B in counts.items()}
      if cache is not None and of_block is not None:
        slots_BS = ("batch", None)
        store_through = self.partitioner.on_each_device(store, (slots_BS, ROWS, ROWS), slots_BS)
        through_BT = chosen_BT.astype(cache[THROUGH].dtype)
        of_block = of_block | {THROUGH: store_through(cache[THROUGH], through_BT, context.positions_BT)}
    return x_BTD, {DEPTHS: counts} | ({CHOSEN: of_experts[EXPERTS]} if of_experts else {}), of_block

  def _logits(self, x_BTD: jax.Array, w_DX: nnx.Param) -> jax.Array:
    """Logits in float32, as of routers over experts."""
    logits_BTX = exact_product("BTD,DX->BTX", x_BTD.astype(jnp.float32), w_DX[...])
    return self.partitioner.constrain(logits_BTX[..., 0], *ROWS)

  def _predicted(self, x_BTD: jax.Array) -> jax.Array | None:
    """Logits of the predictor, which do not affect the gradients of the model."""
    if self.w_predictor_DX is None or self.b_predictor_X is None:
      return None
    return self._logits(jax.lax.stop_gradient(x_BTD), self.w_predictor_DX) + self.b_predictor_X[...].reshape(1, 1)

  def _inner(self, context: Context, order: Order, before_B: jax.Array | None) -> Context:
    """The context of the tokens of the slots. Positions count the tokens of a document that went through the layer,
    before which are `before_B` in the cache."""

    def take(x_BTX: jax.Array) -> jax.Array:
      def on_device(x_BTX: jax.Array, token_BC: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BTX, token_BC.reshape(*token_BC.shape, *(1,) * (x_BTX.ndim - 2)), axis=1)

      names = (*ROWS, *(None,) * (x_BTX.ndim - 2))
      return self.partitioner.on_each_device(on_device, (names, ROWS), names)(x_BTX, order.token_BC)

    segments_BC = jnp.where(order.taken_BC, take(context.segments_BT), 0)
    angles = {rotary: (take(cosine), take(sine)) for rotary, (cosine, sine) in context.angles.items()}
    slots_BC = jnp.broadcast_to(jnp.arange(segments_BC.shape[1], dtype=jnp.int32)[None], segments_BC.shape)
    if before_B is not None:
      return Context(segments_BC, before_B[:, None] + slots_BC, angles)
    opens_BC = jnp.pad(segments_BC[:, 1:] != segments_BC[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return Context(segments_BC, slots_BC - jax.lax.cummax(jnp.where(opens_BC, slots_BC, 0), axis=1), angles)

  def _rows(self, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function of features and of an order, on the sequences of each device."""
    return self.partitioner.on_each_device(function, (FEATURES, ROWS, ROWS), FEATURES)


def choose(
  depths: Depths, logits_BT: jax.Array, predicted_BT: jax.Array | None, valid_BT: jax.Array, slots: int
) -> tuple[jax.Array, jax.Array]:
  """Returns which tokens are chosen, and the weight of the layer for each token in float32.

  Args:
    depths: the kind of mixture.
    logits_BT: outputs of the router.
    predicted_BT: logits of the predictor, if there is one.
    valid_BT: False for padding, which is never chosen.
    slots: maximum number of chosen tokens of `TopKDepths` in a sequence. That of others is not limited here.
  """
  if isinstance(depths, TopKDepths):
    ranked_BT = jnp.argsort(jnp.where(valid_BT, -jax.lax.stop_gradient(logits_BT), jnp.inf), axis=1, stable=True)
    return (jnp.argsort(ranked_BT, axis=1) < slots) & valid_BT, logits_BT
  if isinstance(depths, ThresholdDepths):
    gates_BT = jax.nn.sigmoid(logits_BT)
    return (gates_BT >= depths.threshold) & valid_BT, gates_BT
  assert predicted_BT is not None
  return (predicted_BT > 0) & valid_BT, logits_BT


def order_of(chosen_BT: jax.Array, slots: int) -> Order:
  """The order of tokens, of which the first `slots` have a slot."""
  token_BT = jnp.argsort(~chosen_BT, axis=1, stable=True).astype(jnp.int32)
  slot_BT = jnp.argsort(token_BT, axis=1).astype(jnp.int32)
  count_B1 = jnp.sum(chosen_BT, axis=1, keepdims=True, dtype=jnp.int32)
  return Order(token_BT[:, :slots], slot_BT, jnp.arange(slots, dtype=jnp.int32)[None] < count_B1)


@jax.custom_vjp
def collect(x_BTD: jax.Array, token_BC: jax.Array, slot_BT: jax.Array) -> jax.Array:
  """Returns x_BCD of the token of each slot. The backward pass gathers too, since a scatter is slow."""
  return jnp.take_along_axis(x_BTD, token_BC[..., None], axis=1)


@jax.custom_vjp
def spread(x_BCD: jax.Array, token_BC: jax.Array, slot_BT: jax.Array) -> jax.Array:
  """Returns x_BTD from the slot of each token, 0 if it has none. The transpose of `collect`."""
  slots = x_BCD.shape[1]
  x_BTD = jnp.take_along_axis(x_BCD, jnp.minimum(slot_BT, slots - 1)[..., None], axis=1)
  return jnp.where((slot_BT < slots)[..., None], x_BTD, 0)


collect.defvjp(
  lambda x, *order: (collect(x, *order), order), lambda order, of_slots: (spread(of_slots, *order), None, None)
)
spread.defvjp(
  lambda x, *order: (spread(x, *order), order), lambda order, of_tokens: (collect(of_tokens, *order), None, None)
)


def count_depths(
  depths: Depths,
  logits_BT: jax.Array,
  predicted_BT: jax.Array | None,
  chosen_BT: jax.Array,
  valid_BT: jax.Array,
  slots: int,
) -> RouterCounts:
  """Sums over the tokens of each sequence: those that went `through`, those `dropped` beyond the slots, and the `loss`.

  With a predictor, the loss of a token is its cross-entropy in nats. Otherwise, that of a sequence is the fraction of
  chosen tokens times the mean gate (arXiv 2410.14268), which lowers the number of chosen tokens.
  """
  chosen_B = jnp.sum(chosen_BT, axis=1, dtype=jnp.float32)
  if predicted_BT is not None:
    signed_BT = jnp.where(chosen_BT, predicted_BT, -predicted_BT)
    loss_B = -jnp.sum(jnp.where(valid_BT, jax.nn.log_sigmoid(signed_BT), 0.0), axis=1)
  else:
    real_B = jnp.maximum(jnp.sum(valid_BT, axis=1, dtype=jnp.float32), 1.0)
    gates_B = jnp.sum(jnp.where(valid_BT, jax.nn.sigmoid(logits_BT), 0.0), axis=1)
    loss_B = chosen_B / real_B * gates_B / real_B
  through_B = jnp.minimum(chosen_B, slots)
  return {"through": through_B, "dropped": chosen_B - through_B, "loss": loss_B}
