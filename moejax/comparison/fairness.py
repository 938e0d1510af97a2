"""Compares two members at equal training time, tokens or FLOPs, by their finished runs and loss curves.

All members of a pair have the same training time by their step times. Their whole runs may still differ in time, and
they differ in tokens and FLOPs. The curve of a run gives its bits per byte at an earlier point. Where shorter budgets
were trained, it goes through the scores of these finished runs. Elsewhere it is the curve of the whole run, whose
learning rate has not decayed there: a run of that length would be better, but not better than a longer finished one.

Z = points of a curve
"""

import dataclasses
from collections.abc import Mapping, Sequence

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
  best_Z: np.ndarray
  """Bits per byte than which a finished run up to this point is taken not to be better: those of the next finished
  run, or of the curve itself where they are fewer, since training losses can rise."""

  @property
  def end(self) -> float:
    return float(self.x_Z[-1])

  def at(self, x: float) -> float:
    """Bits per byte at a point."""
    return float(np.interp(x, self.x_Z, self.bits_Z))

  def best(self, x: float) -> float:
    """The value of `best_Z` at a point."""
    return float(np.interp(x, self.x_Z, self.best_Z))

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
    return Curve(self.x_Z, self.bits_Z + bits, self.best_Z + bits)


def relative_curve(steps_Z: np.ndarray, loss_Z: np.ndarray) -> np.ndarray | None:
  """Training loss at `POINTS`, relative to that at the end. None without losses."""
  if len(steps_Z) < 2:
    return None
  return np.interp(POINTS * steps_Z[-1], steps_Z, loss_Z) / loss_Z[-1]


def between(one: Curve, other: Curve, part: float) -> Curve:
  """The curve that is this part of the way from one curve to another, as far as both reach."""
  x_Z = POINTS * min(one.end, other.end)
  bits_Z = [(1.0 - part) * one.at(x) + part * other.at(x) for x in x_Z]
  best_Z = [(1.0 - part) * one.best(x) + part * other.best(x) for x in x_Z]
  return Curve(x_Z, np.array(bits_Z), np.array(best_Z))


def curve(
  relative: Sequence[np.ndarray],
  bits_per_byte: Sequence[float],
  own: float,
  before: float = 0.0,
  shorter: Mapping[float, float] | None = None,
) -> Curve:
  """The curve of a member whose runs have these relative losses and final scores.

  Between finished runs, bits per byte are a power law of the length. Before the shortest one, held-out bits per byte
  are taken to be proportional to the training loss.

  Args:
    relative: losses of the runs at `POINTS`, relative to those at the end.
    bits_per_byte: scores of the runs at the end.
    own: seconds, tokens or FLOPs of a run.
    before: those of the parent of an upcycled candidate, if they count.
    shorter: mean score of the runs of shorter budgets, by the fraction of the whole one.
  """
  bits_Z = np.mean([one * final for one, final in zip(relative, bits_per_byte, strict=True)], axis=0)
  scores = {**(shorter or {}), 1.0: float(np.mean(bits_per_byte))}
  fractions = sorted(scores)
  first = fractions[0]
  of_finished_Z = np.exp(np.interp(np.log(POINTS), np.log(fractions), np.log([scores[part] for part in fractions])))
  bits_Z *= scores[first] / np.interp(first, POINTS, bits_Z)
  bits_Z = np.where(first <= POINTS, of_finished_Z, bits_Z)
  best_Z = np.where(first <= POINTS, bits_Z, np.minimum(bits_Z, scores[first]))
  return Curve(before + POINTS * own, bits_Z, best_Z)


@dataclasses.dataclass(frozen=True)
class Equal:
  """A candidate minus its dense model at equal time, tokens or FLOPs."""

  at: float
  """The common seconds, tokens or FLOPs: those of the member with fewer."""
  difference: float
  """Bits per byte of the candidate minus those of the dense model, as the curves have them."""
  interval: tuple[float, float]
  """Of the difference. It includes that a run which is read before its end may be as good as its next finished run."""
  factor: Estimate
  """Time, tokens or FLOPs of the dense model divided by those of the candidate, at the lowest loss that both reach.
  Above 1, the candidate needs less. For FLOPs, it is the factor of Artetxe et al. (arXiv 2112.10684). Where the better
  model is read from its loss curve, a finished run would need less, so that its lead is a lower bound."""


def equal(dense: Curve, candidate: Curve, half_width: float) -> Equal:
  """Compares two curves. `half_width` is that of the interval of the difference of their ends."""
  at = min(dense.end, candidate.end)
  factors = [_factor(dense, candidate.shifted(bits)) for bits in (0.0, half_width, -half_width)]
  low, high = candidate.best(at) - dense.at(at) - half_width, candidate.at(at) - dense.best(at) + half_width
  return Equal(at, candidate.at(at) - dense.at(at), (low, high), Estimate(*factors))


def _factor(dense: Curve, candidate: Curve) -> float:
  bits = float(np.max([dense.bits_Z.min(), candidate.bits_Z.min()]))
  return dense.first(bits) / candidate.first(bits) if np.isfinite(bits) else np.nan
