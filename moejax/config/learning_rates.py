"""How the learning rates of the members of a suite are chosen."""

import dataclasses

from moejax.config import checks
from moejax.config.kinds import OfSeveralKinds
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRates(OfSeveralKinds, default="given"):
  """How the learning rate of each member is chosen before it is trained. The report names the method."""

  @property
  def cost(self) -> float:
    """Training time of the choice for one member, as a fraction of its budget."""
    return 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenLearningRates(LearningRates, kind="given"):
  """Each member has the learning rate of its experiment, which is not tuned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRateSweep(LearningRates, kind="sweep"):
  """Each member is first trained for a part of its budget with several learning rates. It then has the one with the
  lowest mean training loss over the last tenth of these steps. All rates see the same text, and held-out text is not
  used, so that the choice does not favor a member on it."""

  factors: tuple[float, ...] = (0.5, 1.0, 2.0)
  """Learning rates to try, relative to that of the experiment."""
  budget: float = 0.1
  """Fraction of the training budget of the member for each learning rate, with a complete schedule."""

  @property
  def cost(self) -> float:
    return self.budget * len(self.factors)

  def __post_init__(self) -> None:
    if len(set(self.factors)) < max(2, len(self.factors)):
      raise UserError(f"learning_rates.factors={self.factors} must be at least two different factors")
    if not all(1e-4 <= factor <= 1e4 for factor in self.factors):
      raise UserError(f"learning_rates.factors={self.factors} must lie between 0.0001 and 10000")
    checks.positive(self, "budget")
    checks.between(self, "budget", 0.0, 1.0)
