"""Learning rate schedules, as fractions of the peak learning rate."""

import dataclasses
import math

from moejax.config import checks
from moejax.config.kinds import OfSeveralKinds, described
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(OfSeveralKinds):
  """Linear warm-up followed by the schedule of the subclass. To add a schedule, subclass this and define
  `after_warmup`."""

  warmup_fraction: float = 0.02
  """Fraction of all steps over which the learning rate rises linearly from 0 to the peak."""

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      checks.between(self, field.name, 0.0, 1.0)

  def fraction(self, step: int, steps: int) -> float:
    """Fraction of the peak learning rate at step 0, 1, ..., steps - 1."""
    warmup = self.warmup_steps(steps)
    if step < warmup:
      return (step + 1) / warmup
    return self.after_warmup(min(1.0, (step - warmup) / max(1, steps - 1 - warmup)))

  def warmup_steps(self, steps: int) -> int:
    """Number of steps of the warm-up in a run of `steps` steps."""
    return math.ceil(self.warmup_fraction * steps)

  def after_warmup(self, progress: float) -> float:
    """Fraction of the peak, with `progress` from 0 at the end of warm-up to 1 at the last step."""
    raise UserError(f"{described(type(self))} does not define after_warmup; define it as Schedule.after_warmup says")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
  """Cosine decay from the peak to the final fraction (SGDR, arXiv 1608.03983, without restarts)."""

  final_fraction: float = 0.1
  """Learning rate at the last step, as a fraction of the peak."""

  def after_warmup(self, progress: float) -> float:
    return self.final_fraction + (1.0 - self.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
  """Linear decay from the peak to the final fraction."""

  final_fraction: float = 0.0
  """Learning rate at the last step, as a fraction of the peak."""

  def after_warmup(self, progress: float) -> float:
    return 1.0 - (1.0 - self.final_fraction) * progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
  """Constant at the peak, then linear decay to the final fraction (MiniCPM, arXiv 2404.06395)."""

  decay_fraction: float = 0.2
  """Fraction of the steps after warm-up that decay the learning rate, at the end of the run."""
  final_fraction: float = 0.0
  """Learning rate at the last step, as a fraction of the peak."""

  def after_warmup(self, progress: float) -> float:
    if progress <= 1.0 - self.decay_fraction:
      return 1.0
    # From the end, where the fraction is exact and never below 0 by rounding.
    return self.final_fraction + (1.0 - self.final_fraction) * min(1.0, (1.0 - progress) / self.decay_fraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
  """Constant at the peak after warm-up."""

  def after_warmup(self, progress: float) -> float:
    return 1.0
