"""LoRA (arXiv 2106.09685) as an optimizer: each matrix of a layer is trained in a subspace of low rank.

The weight of a matrix is its first value plus a product of two narrow matrices, which are the state of the optimizer.
By the chain rule their gradients follow from that of the weight, so that the model does not change: a checkpoint, an
export and an evaluation see the merged weights. All other parameters are constant, except for routers if they are
trained, which AdamW trains as they are.

I contracted dimension  J other dimension  X = rank
Leading dimensions of stacked layers and experts are not named.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moejax.config.optimizer import LoRA
from moejax.training.matrices import as_matrix, by_path, from_matrix, matrices

ROUTER = "['w_router_DE']"
"""The end of the path of the weights of a router over experts."""

WHOLE = "whole"
"""The only factor of a router: its weights."""


class Narrow(NamedTuple):
  """The two factors of each matrix, and the state of their optimizer."""

  factors: Any
  """By the path of the parameter: down_IX and up_XJ, or the weights of a router."""
  adam: Any


def lora(config: LoRA, axes: Any) -> optax.GradientTransformationExtraArgs:
  """LoRA with AdamW for its factors.

  Args:
    config: the optimizer.
    axes: for each parameter the input and output axes of a matrix, or None.
  """
  scale = config.alpha / config.rank
  adam = optax.chain(
    optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
    optax.add_decayed_weights(config.weight_decay),
  )
  adapted = matrices(axes)

  def init(parameters: optax.Params) -> Narrow:
    factors: dict[str, dict[str, jax.Array]] = {}
    for path, weight in by_path(parameters).items():
      if path in adapted:
        w_IJ = as_matrix(weight, adapted[path])
        *stacked, I, J = w_IJ.shape
        key = jax.random.fold_in(jax.random.key(0), len(factors))
        down_IX = jax.random.normal(key, (*stacked, I, config.rank)) / math.sqrt(I)
        factors[path] = {"down": down_IX, "up": jnp.zeros((*stacked, config.rank, J))}
      elif config.routers and path.endswith(ROUTER):
        factors[path] = {WHOLE: weight}
    return Narrow(factors, adam.init(factors))

  def update(
    gradients: optax.Updates,
    state: Any,
    parameters: optax.Params | None = None,
    *,
    learning_rate: jax.Array,
    **others: Any,
  ) -> tuple[optax.Updates, Narrow]:
    of_weights = by_path(gradients)
    of_factors = {}
    for path, pair in state.factors.items():
      if WHOLE in pair:
        of_factors[path] = {WHOLE: of_weights[path]}
        continue
      of_w_IJ = scale * as_matrix(of_weights[path], adapted[path])
      of_factors[path] = {
        "down": jnp.einsum("...IJ,...XJ->...IX", of_w_IJ, pair["up"]),
        "up": jnp.einsum("...IX,...IJ->...XJ", pair["down"], of_w_IJ),
      }
    updates, adam_state = adam.update(of_factors, state.adam, state.factors)
    factors = jax.tree.map(lambda factor, update: factor - learning_rate * update, state.factors, updates)

    def of_weight(path: Any, gradient: jax.Array) -> jax.Array:
      name = jax.tree_util.keystr(path)
      if name not in factors:
        return jnp.zeros_like(gradient)
      if WHOLE in factors[name]:
        return updates[name][WHOLE]
      moved_IJ = scale * (_product(factors[name]) - _product(state.factors[name]))
      # The training step multiplies by the negative learning rate.
      moved_IJ = jnp.where(learning_rate > 0, -moved_IJ / jnp.maximum(learning_rate, 1e-30), 0.0)
      return from_matrix(moved_IJ, gradient.shape, adapted[name])

    return jax.tree_util.tree_map_with_path(of_weight, gradients), Narrow(factors, adam_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _product(pair: dict[str, jax.Array]) -> jax.Array:
  return jnp.einsum("...IX,...XJ->...IJ", pair["down"], pair["up"])
