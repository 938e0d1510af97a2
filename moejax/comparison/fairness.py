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


def between(one: Curve, other: Curve, part: float) -> Curve:
  """The curve that is this part of the way from one curve to another, as far as both reach."""
  x_Z = POINTS * min(one.end, other.end)
  bits_Z = [(1.0 - part) * one.at(x) + part * other.at(x) for x in x_Z]
  return Curve(x_Z, np.array(bits_Z))


def curve(relative: Sequence[np.ndarray], bits_per_byte: Sequence[float], own: float, before: float = 0.0) -> Curve:
  """The curve of a member whose runs have these relative losses and final scores. Held-out bits per byte are taken to
  be proportional to the training loss.

  Args:
    relative: losses of the runs at `POINTS`, relative to those at the end.
    bits_per_byte: scores of the runs at the end.
    own: seconds, tokens or FLOPs of a run.
    before: those of the parent of an upcycled candidate, if they count.
  """
  bits = np.mean([one * final for one, final in zip(relative, bits_per_byte, strict=True)], axis=0)
  return Curve(before + POINTS * own, bits)


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
