"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): modules that predict tokens further ahead.

They are trained with the model and not used otherwise. Module k computes, for the token at position t, features from
which the token at t + k + 1 is predicted, from those of module k - 1 and the embedding of the token at t + k. The
embedding and the output projection are those of the model.

B batch  T query position  D embed  J other dimension
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config.model import Model
from moejax.models.attend import Context
from moejax.models.block import Block
from moejax.models.moe.router_counts import RouterCounts
from moejax.models.norms import residual_norm
from moejax.models.products import operand, product
from moejax.models.weights import weight
from moejax.partitioning import Partitioner


class Tokens(NamedTuple):
  """The tokens from which a module predicts, and those that it predicts."""

  tokens_BT: jax.Array
  targets_BT: jax.Array
  segments_BT: jax.Array
  """0 where the document, or its part in the sequence, has no such token, as for padding."""
  positions_BT: jax.Array
  weights_BT: jax.Array
  """float32, 0 for targets that are ignored."""


def tokens_ahead(tokens: Tokens, depth: int) -> Tokens:
  """The tokens of a module at this depth, given those of the model. Depth 0 is the model itself.

  A target counts if it counts for the model and belongs to the document of the token from which it is predicted.
  """
  if depth == 0:
    return tokens
  segments_BT = tokens.segments_BT
  segments_BT = jnp.where(_ahead(segments_BT, depth) == segments_BT, segments_BT, 0)
  return Tokens(
    _ahead(tokens.tokens_BT, depth),
    _ahead(tokens.targets_BT, depth),
    segments_BT,
    tokens.positions_BT,
    jnp.where(segments_BT > 0, _ahead(tokens.weights_BT, depth), 0.0),
  )


def _ahead(x_BT: jax.Array, by: int) -> jax.Array:
  """The values of the tokens this number of positions later, 0 after the end of the sequence."""
  return jnp.pad(x_BT[:, by:], ((0, 0), (0, min(by, x_BT.shape[1]))))


class MultiTokenModule(nnx.Module):
  """One module: a projection of features and embeddings, a block like the last layer of the model, and a norm."""

  def __init__(self, model: Model, partitioner: Partitioner, rngs: nnx.Rngs):
    D = model.d_model
    self.state_norm = residual_norm(model)
    self.token_norm = residual_norm(model)
    # The projection from 2 D to D of the paper, as one matrix for each half of its input.
    self.w_state_DJ = weight(rngs, (D, D), ("embed", None), fan_in=2 * D)
    self.w_token_DJ = weight(rngs, (D, D), ("embed", None), fan_in=2 * D)
    self.block = Block(model.attention_layers[-1], model, model.moe is not None, partitioner, rngs)
    self.final_norm = residual_norm(model)
    self.gradients = model.gradient_dtype
    self.partitioner = partitioner

  def __call__(
    self, x_BTD: jax.Array, next_BTD: jax.Array, context: Context, keys_B: jax.Array | None
  ) -> tuple[jax.Array, dict[str, RouterCounts]]:
    """Returns x_BTD before the last norm, and the counts of each router with a leading dimension of one layer.

    Args:
      x_BTD: features of the depth before.
      next_BTD: embedding of the token that the depth before predicts.
      context: segments are 0 where there is no such token.
      keys_B: random keys of the sequences, or None without noise.
    """
    with jax.named_scope("multi_token"):
      halves = ((self.state_norm, x_BTD, self.w_state_DJ), (self.token_norm, next_BTD, self.w_token_DJ))
      state_BTD, token_BTD = (
        product("BTD,DJ->BTJ", norm(x), operand(w[...], x.dtype, self.gradients)) for norm, x, w in halves
      )
      x_BTD = self.partitioner.constrain(state_BTD + token_BTD, "batch", "sequence", "act_embed")
    x_BTD, counts, _ = self.block(x_BTD, context, None, keys_B)
    return x_BTD, jax.tree.map(lambda count: count[None], counts)
