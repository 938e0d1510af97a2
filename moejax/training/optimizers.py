"""From the configuration of an optimizer to optax, its decay mask, and the learning rate of a step."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from moejax.config.optimizer import AdamW, Lion, Muon, Optimizer
from moejax.errors import UserError

MakeOptimizer = Callable[[Any, nnx.State], optax.GradientTransformation]
"""(configuration, parameters with their logical names) to the direction of the update, without the learning rate.

The step clips before it, and multiplies by minus the learning rate after it. The learning rate stays outside so that
the length of a run is no part of the compiled step: the step whose time is measured is then the step that trains,
however many steps that time turns out to buy.
"""


def adamw(config: AdamW, parameters: nnx.State) -> optax.GradientTransformation:
  """Adam's direction plus decayed weights."""
  return optax.chain(
    optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask(parameters)),
  )


def lion(config: Lion, parameters: nnx.State) -> optax.GradientTransformation:
  """The sign of the interpolated momentum plus decayed weights."""
  return optax.chain(
    optax.scale_by_lion(b1=config.beta1, b2=config.beta2),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask(parameters)),
  )


def muon(config: Muon, parameters: nnx.State) -> optax.GradientTransformation:
  """Orthogonalised momentum for matrices between embed and the inner widths, Adam for all else."""
  return optax.chain(
    optax.contrib.muon(
      learning_rate=1.0,
      ns_steps=config.iterations,
      beta=config.beta,
      consistent_rms=config.update_rms,
      adam_b1=config.adam_beta1,
      adam_b2=config.adam_beta2,
      muon_weight_dimension_numbers=_by_variable(_matrix_axes, parameters),
    ),
    optax.scale(-1.0),  # optax's own minus; the step has one
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask(parameters)),
  )


OPTIMIZERS: dict[type[Optimizer], MakeOptimizer] = {AdamW: adamw, Lion: lion, Muon: muon}
"""By class of the configuration; a user's own file may add to it."""


def make_optimizer(config: Optimizer, parameters: nnx.State) -> optax.GradientTransformation:
  """The optimizer of a configuration.

  Raises:
    UserError: OPTIMIZERS has no function for its class.
  """
  make = OPTIMIZERS.get(type(config))
  if make is None:
    name = type(config).__name__
    raise UserError(f"optimizer {name} has no function; add one, as in moejax.training.optimizers.OPTIMIZERS[{name}]")
  return make(config, parameters)


def decay_mask(parameters: nnx.State) -> dict:
  """True for parameters that decay: matrices, not the scales of norms, however many layers are stacked."""
  return _by_variable(lambda names: len(_unstacked(names)) > 1, parameters)


def learning_rate(config: Optimizer, step: int, steps: int) -> float:
  """Learning rate of step 0, 1, ..., steps - 1."""
  return config.learning_rate * config.schedule.fraction(step, steps)


_EMBED = ("embed", "expert_embed")
_STACKED = ("layers", "experts")


def _matrix_axes(names: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
  """Which axes of a weight its layer sums over and which it makes; None for what is no matrix of a layer."""
  own = [axis for axis, name in enumerate(names) if name not in _STACKED]
  embed = [axis for axis in own if names[axis] in _EMBED]
  inner = [axis for axis in own if names[axis] not in _EMBED]
  if not embed or not inner or any(names[axis] in (None, "vocab") for axis in inner):
    return None
  into, out_of = (embed, inner) if embed[0] < inner[0] else (inner, embed)
  return optax.contrib.MuonDimensionNumbers(tuple(into), tuple(out_of))


def _unstacked(names: tuple[str | None, ...]) -> list[str | None]:
  return [name for name in names if name != "layers"]


def _by_variable(function: Callable[[tuple[str | None, ...]], Any], parameters: nnx.State) -> dict:
  """`function` of the logical names of each parameter, in the structure of the parameters."""
  is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
  return nnx.to_pure_dict(jax.tree.map(lambda variable: function(variable.names), parameters, is_leaf=is_variable))
