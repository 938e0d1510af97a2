"""SpIEL-AG (arXiv 2401.16405) as an optimizer: of each matrix of a layer, a sparse set of weights is trained.

The state has the indices of the chosen weights, their first values and their deltas, so that its size is that of the
chosen weights. As in section 3 of the paper, the indices change in phases: the smallest deltas are dropped, which
resets their weights to the first values, and the weights whose gradients, summed over some steps, are largest replace
them. Candidates are the weights with the largest gradients in the first of these steps, whose means and mean
squares become the moments of Adam.

I contracted dimension  J other dimension
X = chosen weights of a matrix, or its candidates  Y = weights of a matrix
Leading dimensions of stacked layers and experts are not named.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moejax.config.optimizer import SpIEL
from moejax.training.matrices import as_matrix, by_path, from_matrix, matrices


class Chosen(NamedTuple):
  """The chosen weights of one parameter, and the candidates that may replace them."""

  indices_X: jax.Array
  """int32, in the matrix as a vector."""
  first_X: jax.Array
  """The values of the weights before they were chosen."""
  delta_X: jax.Array
  mean_X: jax.Array
  """First moment of Adam."""
  square_X: jax.Array
  """Second moment of Adam."""
  age_X: jax.Array
  """Number of gradients in the moments, int32."""
  candidates_X: jax.Array
  """Indices of the candidates, int32."""
  sums_X: jax.Array
  """Sums of the gradients of the candidates."""
  squares_X: jax.Array
  """Sums of their squared gradients."""


class Sparse(NamedTuple):
  """The state of the optimizer."""

  steps: jax.Array
  """Number of steps, int32."""
  peak: jax.Array
  """The largest learning rate of these steps."""
  chosen: dict[str, Chosen]
  """By the path of the parameter."""


def spiel(config: SpIEL, axes: Any) -> optax.GradientTransformationExtraArgs:
  """Trains a sparse set of weights of each matrix with AdamW, whose weight decay applies to the deltas.

  Args:
    config: the optimizer.
    axes: for each parameter the input and output axes of a matrix, or None.
  """
  adapted = matrices(axes)

  def init(parameters: optax.Params) -> Sparse:
    vectors = {
      path: _as_vector(weight, adapted[path]) for path, weight in by_path(parameters).items() if path in adapted
    }
    zero = jnp.zeros((), jnp.float32)
    return Sparse(jnp.zeros((), jnp.int32), zero, {path: _nothing(config, w_Y) for path, w_Y in vectors.items()})

  def update(
    gradients: optax.Updates,
    state: Any,
    parameters: optax.Params | None = None,
    *,
    learning_rate: jax.Array,
    **others: Any,
  ) -> tuple[optax.Updates, Sparse]:
    weights, chosen = by_path(parameters), dict[str, Chosen]()
    peak = jnp.maximum(state.peak, learning_rate)
    # The first choice replaces all weights. Later, the fraction decays with the learning rate.
    decay = learning_rate / jnp.maximum(peak, 1e-30)
    fraction = jnp.where(state.steps < config.accumulated, 1.0, config.replaced * decay)

    def of_weight(path: Any, gradient: jax.Array) -> jax.Array:
      name = jax.tree_util.keystr(path)
      if name not in adapted:
        return jnp.zeros_like(gradient)
      of, w_Y = adapted[name], _as_vector(weights[name], adapted[name])
      moved_Y, chosen[name] = _step(
        config, state.steps, learning_rate, fraction, state.chosen[name], w_Y, _as_vector(gradient, of)
      )
      return from_matrix(moved_Y, gradient.shape, of)

    updates = jax.tree_util.tree_map_with_path(of_weight, gradients)
    return updates, Sparse(state.steps + 1, peak, {name: chosen[name] for name in state.chosen})

  return optax.GradientTransformationExtraArgs(init, update)


def _as_vector(weight: jax.Array, axes: Any) -> jax.Array:
  w_IJ = as_matrix(weight, axes)
  return w_IJ.reshape(*w_IJ.shape[:-2], -1)


def _nothing(config: SpIEL, w_Y: jax.Array) -> Chosen:
  """The state before the first choice, with indices that are all replaced."""
  *stacked, Y = w_Y.shape
  shape = (*stacked, max(1, round(config.density * Y)))
  indices_X = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
  zero_X, none_X = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
  return Chosen(indices_X, zero_X, zero_X, zero_X, zero_X, none_X, indices_X, zero_X, zero_X)


def _step(
  config: SpIEL,
  steps: jax.Array,
  learning_rate: jax.Array,
  fraction: jax.Array,
  before: Chosen,
  w_Y: jax.Array,
  gradient_Y: jax.Array,
) -> tuple[jax.Array, Chosen]:
  """The update of a parameter, which the training step multiplies by the negative learning rate, and the next state."""
  phase, is_chosen = steps % config.interval, steps >= config.accumulated
  before = before._replace(first_X=jnp.where(is_chosen, before.first_X, _at(w_Y, before.indices_X)))
  after = _adam(config, learning_rate, before, _at(gradient_Y, before.indices_X))
  after = jax.tree.map(lambda new, old: jnp.where(is_chosen, new, old), after, before)
  case = jnp.where(phase == 0, 0, jnp.where(phase < config.accumulated, 1, 2))
  after = jax.lax.switch(case, (_propose, _accumulate, lambda of, gradient_Y: of), after, gradient_Y)
  count = jnp.floor(fraction * before.indices_X.shape[-1])
  nothing_X = jnp.zeros(before.indices_X.shape, jnp.bool_)
  replaced_X, chosen = jax.lax.cond(
    phase == config.accumulated - 1, lambda: _choose(config, is_chosen, count, after, w_Y), lambda: (nothing_X, after)
  )
  moved_X = _at(w_Y, before.indices_X) - before.first_X - jnp.where(replaced_X, 0.0, after.delta_X)
  moved_X = jnp.where(learning_rate > 0, moved_X / jnp.maximum(learning_rate, 1e-30), 0.0)
  return _put(jnp.zeros_like(w_Y), before.indices_X, moved_X), chosen


def _adam(config: SpIEL, learning_rate: jax.Array, of: Chosen, gradient_X: jax.Array) -> Chosen:
  """A step of AdamW for the deltas, each with the number of its own gradients."""
  age_X = of.age_X + 1
  mean_X = config.beta1 * of.mean_X + (1 - config.beta1) * gradient_X
  square_X = config.beta2 * of.square_X + (1 - config.beta2) * gradient_X**2
  direction_X = (mean_X / (1 - config.beta1**age_X)) / (jnp.sqrt(square_X / (1 - config.beta2**age_X)) + config.epsilon)
  delta_X = of.delta_X - learning_rate * (direction_X + config.weight_decay * of.delta_X)
  return of._replace(delta_X=delta_X, mean_X=mean_X, square_X=square_X, age_X=age_X)


def _propose(of: Chosen, gradient_Y: jax.Array) -> Chosen:
  """The weights with the largest gradients become the candidates."""
  _, candidates_X = jax.lax.top_k(jnp.abs(gradient_Y), of.indices_X.shape[-1])
  gradient_X = _at(gradient_Y, candidates_X)
  return of._replace(candidates_X=candidates_X, sums_X=gradient_X, squares_X=gradient_X**2)


def _accumulate(of: Chosen, gradient_Y: jax.Array) -> Chosen:
  gradient_X = _at(gradient_Y, of.candidates_X)
  return of._replace(sums_X=of.sums_X + gradient_X, squares_X=of.squares_X + gradient_X**2)


def _choose(
  config: SpIEL, is_chosen: jax.Array, count: jax.Array, of: Chosen, w_Y: jax.Array
) -> tuple[jax.Array, Chosen]:
  """Replaces the `count` smallest deltas of each matrix by the candidates with the largest sums. Returns which weights
  are replaced. `is_chosen` is False at the first choice."""
  none_Y, size_X = jnp.zeros(w_Y.shape, jnp.bool_), jnp.abs(of.delta_X)
  weak_X = _rank(size_X) < count
  is_kept_X = _at(_put(none_Y, of.indices_X, ~weak_X), of.candidates_X)
  score_X = jnp.where(is_kept_X, -1.0, jnp.abs(of.sums_X))
  strong_X = (_rank(-score_X) < count) & ~is_kept_X
  # A weight that is among both keeps its delta, if it has one.
  dropped_X = weak_X & ~(is_chosen & _at(_put(none_Y, of.candidates_X, strong_X), of.indices_X))
  grown_X = strong_X & ~(is_chosen & _at(_put(none_Y, of.indices_X, weak_X), of.candidates_X))
  slots_X = jnp.argsort(jnp.where(dropped_X, size_X, jnp.inf))
  news_X = jnp.argsort(jnp.where(grown_X, -score_X, jnp.inf))
  number_X = jax.lax.broadcasted_iota(jnp.int32, size_X.shape, size_X.ndim - 1)
  is_new_X = number_X < jnp.sum(grown_X, axis=-1, keepdims=True)

  def with_new(old_X: jax.Array, new_X: jax.Array) -> jax.Array:
    return _put(old_X, slots_X, jnp.where(is_new_X, _at(new_X, news_X), _at(old_X, slots_X)))

  steps = config.accumulated
  chosen = of._replace(
    indices_X=with_new(of.indices_X, of.candidates_X),
    first_X=with_new(of.first_X, _at(w_Y, of.candidates_X)),
    delta_X=with_new(of.delta_X, jnp.zeros_like(of.delta_X)),
    mean_X=with_new(of.mean_X, of.sums_X / steps * (1 - config.beta1**steps)),
    square_X=with_new(of.square_X, of.squares_X / steps * (1 - config.beta2**steps)),
    age_X=with_new(of.age_X, jnp.full_like(of.age_X, steps)),
  )
  return _put(jnp.zeros_like(dropped_X), slots_X, is_new_X), chosen


def _rank(x_X: jax.Array) -> jax.Array:
  """The number of entries of a matrix that are smaller than each entry."""
  return jnp.argsort(jnp.argsort(x_X))


def _at(w_Y: jax.Array, indices_X: jax.Array) -> jax.Array:
  return jnp.take_along_axis(w_Y, indices_X, axis=-1)


def _put(w_Y: jax.Array, indices_X: jax.Array, values_X: jax.Array) -> jax.Array:
  return jnp.put_along_axis(w_Y, indices_X, values_X, axis=-1, inplace=False)
