"""Scaling of rotary embeddings, for texts that are longer than those of the first part of training."""

import dataclasses
import math

from moejax.config import checks
from moejax.config.kinds import OfSeveralKinds, described
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling(OfSeveralKinds, default="none"):
  """Base class of the scalings of rotary embeddings. `RopeScaling()` returns `NoScaling()`, the default.

  To add a scaling, subclass this and define `multipliers`.
  """

  def multipliers(self, width: int, theta: float) -> list[float]:
    """Factor of each frequency of a rotary embedding with `width` dimensions, the highest frequency first."""
    raise UserError(f"{described(type(self))} does not define multipliers; define it as RopeScaling.multipliers says")

  @property
  def magnitude(self) -> float:
    """Factor of rotated queries and keys."""
    return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoScaling(RopeScaling, kind="none"):
  """The frequencies of arXiv 2104.09864."""

  def multipliers(self, width: int, theta: float) -> list[float]:
    return [1.0] * (width // 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling, kind="linear"):
  """All frequencies are divided by one factor (arXiv 2306.15595; global layers of Gemma 3)."""

  factor: float
  """By which frequencies are divided."""

  def __post_init__(self) -> None:
    checks.positive(self, "factor")

  def multipliers(self, width: int, theta: float) -> list[float]:
    return [1 / self.factor] * (width // 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling(LinearScaling, kind="llama3"):
  """Low frequencies are divided by the factor and high ones are not, with a ramp between them (Llama 3.1), or a border
  where low_frequency and high_frequency are equal (Llama 4 Scout)."""

  low_frequency: float = 1.0
  """Rotations within original_length up to which a frequency is low."""
  high_frequency: float = 4.0
  """Rotations within original_length from which a frequency is high."""
  original_length: int = 8192
  """Length of the texts before the scaling, in tokens."""

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.positive(self, "low_frequency", "high_frequency", "original_length")
    if self.low_frequency > self.high_frequency:
      raise UserError(
        f"rope_scaling.low_frequency={self.low_frequency} must be at most rope_scaling.high_frequency="
        f"{self.high_frequency}; lower it"
      )

  def multipliers(self, width: int, theta: float) -> list[float]:
    def multiplier(frequency: float) -> float:
      rotations = self.original_length * frequency / (2 * math.pi)
      kept = _ramp(rotations, self.low_frequency, self.high_frequency)
      return (1 - kept) / self.factor + kept

    return [multiplier(theta ** (-2 * i / width)) for i in range(width // 2)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling(LinearScaling, kind="yarn"):
  """Low frequencies are divided by the factor and high ones are not, with a ramp over the dimensions between them
  (YaRN, arXiv 2309.00071, section 3.2; gpt-oss, DeepSeek-V3)."""

  beta_fast: float = 32.0
  """Rotations within original_length of the last dimension whose frequency is kept."""
  beta_slow: float = 1.0
  """Rotations within original_length of the first dimension whose frequency is divided by the whole factor."""
  original_length: int = 4096
  """Length of the texts before the scaling, in tokens."""
  whole_dimensions: bool = True
  """Whether the ramp begins and ends at whole dimensions (DeepSeek-V3), or between them too (gpt-oss)."""
  attention_factor: float | None = None
  """Factor of rotated queries and keys. None: 0.1 x ln(factor) + 1."""

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.positive(self, "beta_fast", "beta_slow", "original_length")
    if self.attention_factor is not None:
      checks.positive(self, "attention_factor")
    if self.beta_slow >= self.beta_fast:
      raise UserError(
        f"rope_scaling.beta_slow={self.beta_slow} must be below rope_scaling.beta_fast={self.beta_fast}; lower it"
      )

  def multipliers(self, width: int, theta: float) -> list[float]:
    if theta <= 1:
      raise UserError(
        f"rope_theta={theta} must be above 1 with rope_scaling.kind yarn, which needs falling frequencies; raise it"
      )
    first, last = self._dimension(self.beta_fast, width, theta), self._dimension(self.beta_slow, width, theta)
    if self.whole_dimensions:
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    divided = [_ramp(i, first, last if last != first else first + 0.001) for i in range(width // 2)]
    return [share / self.factor + (1 - share) for share in divided]

  def _dimension(self, rotations: float, width: int, theta: float) -> float:
    """The dimension, between whole ones too, whose frequency has this number of rotations within original_length."""
    return width * math.log(self.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

  @property
  def magnitude(self) -> float:
    if self.attention_factor is not None:
      return self.attention_factor
    return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


def _ramp(x: float, low: float, high: float) -> float:
  """0 up to `low`, 1 from `high`, linear between them. If they are equal, 1 only above them."""
  if low == high:
    return float(x > high)
  return min(1.0, max(0.0, (x - low) / (high - low)))
