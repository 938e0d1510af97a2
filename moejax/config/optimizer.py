"""Optimizers: what each is made of. `moejax/training/optimizers.py` makes them from optax."""

import dataclasses

from moejax.config import checks
from moejax.config.kinds import OfSeveralKinds
from moejax.config.schedule import Cosine, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(OfSeveralKinds):
  """What every optimizer has. `Optimizer(...)` is `AdamW(...)`, the default kind. One of your own subclasses this, and
  its function is added to `moejax.training.optimizers.OPTIMIZERS`."""

  learning_rate: float
  """Peak, reached after warm-up."""
  schedule: Schedule = Cosine()
  """How the learning rate changes over the run."""
  weight_decay: float = 0.1
  """Decoupled: times the learning rate. On matrices only, not on the scales of norms and the biases of routers."""
  gradient_clip: float = 1.0
  """Largest global norm of the gradient; a larger gradient is scaled down to it."""

  def __new__(cls, **fields: object) -> "Optimizer":
    return super().__new__(AdamW if cls is Optimizer else cls)

  def __post_init__(self):
    checks.positive(self, "learning_rate", "gradient_clip")
    checks.not_negative(self, "weight_decay")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
  """AdamW (arXiv 1711.05101)."""

  beta1: float = 0.9
  """Decay of the first moment."""
  beta2: float = 0.95
  """Decay of the second moment."""
  epsilon: float = 1e-8
  """Added to the root of the second moment."""

  def __post_init__(self):
    super().__post_init__()
    checks.positive(self, "epsilon")
    checks.below_one(self, "beta1", "beta2")  # at 1 Adam divides by 1 - beta^step = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
  """Lion (arXiv 2302.06675): the sign of an interpolated momentum, one moment. It wants a learning rate 3 to 10 times
  lower and a weight decay as much higher than AdamW's."""

  beta1: float = 0.9
  """Weight of the momentum in the update."""
  beta2: float = 0.99
  """Decay of the momentum."""

  def __post_init__(self):
    super().__post_init__()
    checks.below_one(self, "beta1", "beta2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
  """Muon (Jordan et al. 2024) for the matrices of layers, Adam for embeddings, routers and norms, both with Nesterov
  momentum. Updates are scaled to the size of AdamW's (arXiv 2502.16982), whose learning rate and weight decay then
  carry over."""

  beta: float = 0.95
  """Decay of the momentum."""
  iterations: int = 5
  """Newton-Schulz iterations that orthogonalise the momentum."""
  update_rms: float = 0.2
  """Root mean square of an update before the learning rate."""
  adam_beta1: float = 0.9
  """Adam's decay of the first moment."""
  adam_beta2: float = 0.95
  """Adam's decay of the second moment."""

  def __post_init__(self):
    super().__post_init__()
    checks.positive(self, "iterations", "update_rms")
    checks.below_one(self, "beta", "adam_beta1", "adam_beta2")
