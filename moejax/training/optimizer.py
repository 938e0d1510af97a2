"""AdamW, its decay mask, and the learning rate of a step."""

import math

import jax
import optax
from flax import nnx

from moejax.config.training import Optimizer


def make_optimizer(config: Optimizer, decay_mask: dict) -> optax.GradientTransformation:
  """AdamW (arXiv 1711.05101) without clipping and learning rate, which the step multiplies in.

  The learning rate stays outside so that the length of a run is no part of the compiled step: the step whose time is
  measured is then the step that trains, however many steps that time turns out to buy.
  """
  return optax.chain(
    optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
  )


def decay_mask(parameters: nnx.State) -> dict:
  """True for parameters that decay: matrices, not the scales of norms, however many layers are stacked."""

  def decays(variable: nnx.Variable) -> bool:
    return len([name for name in variable.names if name != "layers"]) > 1

  is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
  return nnx.to_pure_dict(jax.tree.map(decays, parameters, is_leaf=is_variable))


def learning_rate(config: Optimizer, step: int, steps: int) -> float:
  """Learning rate of step 0, 1, ..., steps - 1: linear warm-up to the peak, then cosine to its final fraction."""
  warmup = math.ceil(config.warmup_fraction * steps)
  if step < warmup:
    return config.learning_rate * (step + 1) / warmup
  progress = (step - warmup) / max(1, steps - 1 - warmup)
  cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
  return config.learning_rate * (config.final_fraction + (1.0 - config.final_fraction) * cosine)
