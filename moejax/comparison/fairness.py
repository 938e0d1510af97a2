"""Compares two members at equal training time, tokens or FLOPs, by reading their loss curves.

All members of a pair have the same training time by their step times. Their whole runs may still differ in time, and
they differ in tokens and FLOPs. The curve of a run gives its bits per byte at an earlier point. Since the learning rate
schedule is not complete there, a run of that length would be somewhat better: a speed-up is a lower bound.

Z = points of a curve
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moejax.comparison.statistics import Estimate

POINTS = np.geomspace(1e-3, 1.0, 400)
"""Points of a curve, as fractions of a run."""


@dataclasses.dataclass(frozen=True)
class Curve:
  """Bits per byte of a member over its run, averaged over seeds, against time, tokens or FLOPs."""

  x_Z: np.ndarray
  """Seconds, tokens or FLOPs since the start."""
  bits_Z: np.ndarray

  @property
  def end(self) -> float:
    return float(self.x_Z[-1])

  def at(self, x: float) -> float:
    """Bits per byte at a point."""
    return float(np.interp(x, self.x_Z, self.bits_Z))

  def first(self, bits: float) -> float:
    """The first point that is as good as `bits`. Infinite if there is none."""
    best_Z = np.minimum.accumulate(self.bits_Z)
    i = int(np.searchsorted(-best_Z, -bits))
    if i == len(best_Z):
      return np.inf
    if i == 0 or best_Z[i - 1] == best_Z[i]:
      return float(self.x_Z[i])
    part = (best_Z[i - 1] - bits) / (best_Z[i - 1] - best_Z[i])
    return float(self.x_Z[i - 1] + part * (self.x_Z[i] - self.x_Z[i - 1]))

  def shifted(self, bits: float) -> "Curve":
    return Curve(self.x_Z, self.bits_Z + bits)


def relative_curve(steps_Z: np.ndarray, loss_Z: np.ndarray) -> np.ndarray | None:
  """Training loss at `POINTS`, relative to that at the end. None without losses."""
  if len(steps_Z) < 2:
    return None
  return np.interp(POINTS * steps_Z[-1], steps_Z, loss_Z) / loss_Z[-1]


def curve(relative: Sequence[np.ndarray], bits_per_byte: Sequence[float], end: float) -> Curve:
  """The curve of a member whose runs have these relative losses and final scores, and end at `end` seconds, tokens or
  FLOPs. Held-out bits per byte are taken to be proportional to the training loss."""
  bits = np.mean([one * final for one, final in zip(relative, bits_per_byte, strict=True)], axis=0)
  return Curve(POINTS * end, bits)


@dataclasses.dataclass(frozen=True)
class Equal:
  """A candidate minus its dense model at equal time, tokens or FLOPs."""

  at: float
  """The common seconds, tokens or FLOPs: those of the member with fewer."""
  difference: float
  """Bits per byte of the candidate minus those of the dense model."""
  factor: Estimate
  """Time, tokens or FLOPs of the dense model divided by those of the candidate, at the lowest loss that both reach.
  Above 1, the candidate needs less. For FLOPs, it is the factor of Artetxe et al. (arXiv 2112.10684)."""


def equal(dense: Curve, candidate: Curve, half_width: float) -> Equal:
  """Compares two curves. `half_width` is that of the interval of the difference of their ends."""
  at = min(dense.end, candidate.end)
  factors = [_factor(dense, candidate.shifted(bits)) for bits in (0.0, half_width, -half_width)]
  return Equal(at, candidate.at(at) - dense.at(at), Estimate(*factors))


def _factor(dense: Curve, candidate: Curve) -> float:
  bits = max(float(dense.bits_Z.min()), float(candidate.bits_Z.min()))
  return dense.first(bits) / candidate.first(bits)
