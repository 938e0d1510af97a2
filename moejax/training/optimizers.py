"""Builds optax optimizers and weight decay masks from configurations, and computes the learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moejax.config.kinds import described, function_of, running
from moejax.config.optimizer import AdamW, Lion, LoRA, Muon, Optimizer, SpIEL
from moejax.errors import UserError
from moejax.models.returned import check_returned, shown
from moejax.training.lora import lora
from moejax.training.spiel import spiel

MakeOptimizer = Callable[[Any, nnx.State], optax.GradientTransformation]
"""Maps a configuration and the parameters with their logical axes to an optax transformation without learning rate.

The training step clips gradients before it, passes the learning rate as an extra argument to those that take it, and
multiplies the result by the negative learning rate. Since the learning
rate is an argument, the compiled step does not depend on the length of the run. A comparison can therefore measure the
step time first and derive the number of steps from it.
"""


def adamw(config: AdamW, parameters: nnx.State) -> optax.GradientTransformation:
  """AdamW (arXiv 1711.05101)."""
  return optax.chain(
    optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon, mu_dtype=config.moment_dtype),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask(parameters)),
  )


def lion(config: Lion, parameters: nnx.State) -> optax.GradientTransformation:
  """Lion (arXiv 2302.06675)."""
  return optax.chain(
    optax.scale_by_lion(b1=config.beta1, b2=config.beta2, mu_dtype=config.moment_dtype),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask(parameters)),
  )


def muon(config: Muon, parameters: nnx.State) -> optax.GradientTransformation:
  """Muon for the matrices between the embed dimension and inner dimensions, and Adam for all other parameters."""
  return optax.chain(
    optax.contrib.muon(
      learning_rate=1.0,
      ns_steps=config.iterations,
      beta=config.beta,
      mu_dtype=config.moment_dtype,
      consistent_rms=config.update_rms,
      adam_b1=config.adam_beta1,
      adam_b2=config.adam_beta2,
      muon_weight_dimension_numbers=_by_variable(_matrix_axes, parameters),
    ),
    optax.scale(-1.0),  # the sign of optax, which the training step applies itself
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask(parameters)),
  )


def low_rank(config: LoRA, parameters: nnx.State) -> optax.GradientTransformation:
  """LoRA for the matrices that Muon treats as such."""
  return lora(config, _by_variable(_matrix_axes, parameters))


def sparse(config: SpIEL, parameters: nnx.State) -> optax.GradientTransformation:
  """SpIEL for the matrices that Muon treats as such."""
  return spiel(config, _by_variable(_matrix_axes, parameters))


OPTIMIZERS: dict[type[Optimizer], MakeOptimizer] = {
  AdamW: adamw,
  Lion: lion,
  LoRA: low_rank,
  Muon: muon,
  SpIEL: sparse,
}
"""Optimizers by class of the configuration. Custom optimizers are added to it."""


def make_optimizer(config: Optimizer, parameters: nnx.State) -> optax.GradientTransformationExtraArgs:
  """Makes the optimizer of a configuration.

  Raises:
    UserError: If OPTIMIZERS has no function for its class.
  """
  make = function_of(config, OPTIMIZERS)
  with running(config):
    optimizer = make(config, parameters)
  if not isinstance(optimizer, optax.GradientTransformation):
    raise UserError(f"{described(type(config))} returned {shown(optimizer)}, not an optax.GradientTransformation")
  optimizer = optax.with_extra_args_support(optimizer)
  matrices = decay_mask(parameters)

  def init(parameters: optax.Params) -> optax.OptState:
    with running(config):
      return optimizer.init(parameters)

  def update(
    gradients: optax.Updates, state: optax.OptState, parameters: optax.Params | None = None, **others: Any
  ) -> tuple[optax.Updates, optax.OptState]:
    with running(config):
      updates, new_state = optimizer.update(gradients, state, parameters, **others)
    _check_tree(config, "updates", updates, gradients)
    _check_tree(config, "a state", new_state, state)
    if config.keep_zeros:
      updates = jax.tree.map(_zero_where_zero, updates, parameters, matrices)
    return updates, new_state

  return optax.GradientTransformationExtraArgs(init, update)


def _zero_where_zero(update: jax.Array, weight: jax.Array, is_matrix: bool) -> jax.Array:
  """The update of a weight, 0 for entries of a matrix that are 0."""
  return jnp.where(weight == 0, 0.0, update) if is_matrix else update


def _check_tree(config: Optimizer, name: str, returned: Any, wanted: Any) -> None:
  """Raises UserError if a tree has not the structure and the arrays of another one."""
  structure: Any = jax.tree.structure(returned)
  if structure != jax.tree.structure(wanted):
    raise UserError(f"{described(type(config))} returned {name} of another structure than it was given")
  of_wanted = jax.tree.leaves(wanted)
  for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(returned), of_wanted, strict=True):
    check_returned(config, f"{name} at {jax.tree_util.keystr(path)}", leaf, other.shape, other.dtype)


def decay_mask(parameters: nnx.State) -> dict:
  """True for parameters with weight decay: matrices, but not scales of norms and biases, whether stacked or not."""
  return _by_variable(_is_matrix, parameters)


def learning_rate(config: Optimizer, step: int, steps: int) -> float:
  """The learning rate at `step` (starting at 0) in a run of `steps` steps."""
  with running(config.schedule):
    return config.learning_rate * config.schedule.fraction(step, steps)


_EMBED = ("embed", "expert_embed")
_STACKED = ("layers", "experts")


def _matrix_axes(names: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
  """The input and output axes of a matrix of a layer, or None for other parameters."""
  own = [axis for axis, name in enumerate(names) if name not in _STACKED]
  embed = [axis for axis in own if names[axis] in _EMBED]
  inner = [axis for axis in own if names[axis] not in _EMBED]
  if not embed or not inner or any(names[axis] in (None, "vocab") for axis in inner):
    return None
  into, out_of = (embed, inner) if embed[0] < inner[0] else (inner, embed)
  return optax.contrib.MuonDimensionNumbers(tuple(into), tuple(out_of))


def _is_matrix(names: tuple[str | None, ...]) -> bool:
  own = _unstacked(names)
  of_bias = set(own) <= {"heads", "kv_heads", "head_dim"}  # one for each output of a product
  return len(own) > 1 and not of_bias


def _unstacked(names: tuple[str | None, ...]) -> list[str | None]:
  return [name for name in names if name != "layers"]


def _by_variable(function: Callable[[tuple[str | None, ...]], Any], parameters: nnx.State) -> dict:
  """Applies `function` to the logical axes of each parameter; the result has the structure of the parameters."""
  is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
  return nnx.to_pure_dict(jax.tree.map(lambda variable: function(variable.names), parameters, is_leaf=is_variable))
