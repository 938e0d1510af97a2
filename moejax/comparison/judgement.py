"""Decides what the numbers of a candidate and its dense model establish. `findings.py` puts it into words."""

import math
from collections.abc import Sequence

from moejax.comparison.quantities import interval, percent, ratio, signed_interval
from moejax.comparison.record import (
  CANDIDATE,
  DENSE,
  ESTABLISHED,
  NO_DIFFERENCE,
  NOT_ESTABLISHED,
  VIOLATED,
  Against,
  Interval,
)
from moejax.comparison.statistics import Estimate

MANY_DROPPED = 0.1
"""Fraction of dropped choices above which a candidate is said to drop many."""


def limits(tolerance: float) -> tuple[float, float]:
  """The ratios that are considered equal."""
  return 1.0 - tolerance, 1.0 + tolerance


def equal_time(step_time_ratio: Estimate, whole_run_ratio: float | None, tolerance: float) -> str:
  """Whether a candidate and its dense model have equal step times and, once both are trained, equal training times."""
  low, high = limits(tolerance)
  if step_time_ratio.is_outside(low, high) or (whole_run_ratio is not None and not low <= whole_run_ratio <= high):
    return VIOLATED
  return ESTABLISHED if step_time_ratio.is_within(low, high) else NOT_ESTABLISHED


def has_equal_steps(against: Against, tolerance: float) -> bool:
  """Whether the whole interval of the step time ratio is within the tolerance."""
  low, high = limits(tolerance)
  ends = against.step_time_ratio_interval
  return ends is not None and None not in ends and low <= (ends[0] or 0.0) and (ends[1] or math.inf) <= high


def better(ends: Interval) -> str:
  """The outcome for the interval of a difference in bits per byte, candidate minus dense. Fewer are better."""
  if ends is None or ends[0] is None or ends[1] is None:
    return NOT_ESTABLISHED
  return CANDIDATE if ends[1] < 0 else DENSE if ends[0] > 0 else NO_DIFFERENCE


def outcome(against: Against, tolerance: float) -> str:
  """The outcome at equal step time and equal training time.

  Where the training times of the whole runs differ by more than the tolerance, a model is called better only if it is
  also better at equal time (`bases`).
  """
  if not has_equal_steps(against, tolerance):
    return NOT_ESTABLISHED
  found = better(against.bits_per_byte_difference_interval)
  if against.equal_time == ESTABLISHED:
    return found
  at_equal_time = next((basis.outcome for basis in against.bases if basis.equal == "time"), NOT_ESTABLISHED)
  return found if found == at_equal_time else NOT_ESTABLISHED


def pair_outcome(candidates: Sequence[Against], tolerance: float) -> tuple[str, str | None]:
  """The outcome of a pair, and the best candidate of those with equal step time. The intervals hold for all candidates
  together, so that the best one can be picked."""
  equal = [c for c in candidates if has_equal_steps(c, tolerance) and c.bits_per_byte_difference is not None]
  if not equal:
    return NOT_ESTABLISHED, None
  best = min(equal, key=lambda candidate: candidate.bits_per_byte_difference or 0.0).moe
  found = [candidate.outcome for candidate in equal]
  if CANDIDATE in found:
    return CANDIDATE, best
  if NOT_ESTABLISHED in found:
    return NOT_ESTABLISHED, best
  return (DENSE if set(found) == {DENSE} else NO_DIFFERENCE), best


def notes(
  against: Against, dense: str, tolerance: float, dropped_fraction: float | None, rounds: int
) -> tuple[str, ...]:
  """What limits the outcome of a candidate, most important first.

  Args:
    against: the candidate.
    dense: name of its dense model.
    tolerance: relative difference up to which step times are considered equal.
    dropped_fraction: fraction of dropped choices of experts.
    rounds: number of rounds in which the step times of both were measured.
  """
  found, low_high, equal = [], limits(tolerance), percent(tolerance, 0)
  times = against.step_time_ratio_interval
  measured = f"{ratio(against.step_time_ratio)} ({interval(times)}) times that of {dense}"
  if times is None or None in times:
    found.append(f"the step time of {against.moe} is {measured}, and too few rounds were measured for an interval")
  elif against.step_time_ratio is not None and not has_equal_steps(against, tolerance):
    outside = Estimate(against.step_time_ratio, times[0] or 0.0, times[1] or math.inf).is_outside(*low_high)
    if outside:
      found.append(f"the step time of {against.moe} is {measured}, which is not equal within {equal}")
    else:
      found.append(
        f"the step time of {against.moe} is {measured}, so after {rounds} rounds it is not known whether it is equal "
        f"within {equal} (raise measurement.max_rounds, or measure on an idle machine)"
      )
  if against.bits_per_byte_difference is not None and better(against.bits_per_byte_difference_interval) == (
    NOT_ESTABLISHED
  ):
    found.append(
      "the variation between seeds or documents is unknown, since no member has several runs or there are too few "
      "documents"
    )
  whole = against.whole_run_ratio
  if whole is not None and not low_high[0] <= whole <= low_high[1]:
    text = f"over the whole run, {against.moe} trained {ratio(whole)} times as long as {dense}"
    basis = next((basis for basis in against.bases if basis.equal == "time"), None)
    if basis is not None and basis.bits_per_byte_difference is not None:
      at = signed_interval(basis.bits_per_byte_difference, basis.bits_per_byte_difference_interval)
      text += f"; at equal time, the difference is {at} bits per byte"
    found.append(text)
  if dropped_fraction is not None and dropped_fraction > MANY_DROPPED:
    found.append(f"{against.moe} drops {percent(dropped_fraction)} of its choices of experts")
  return tuple(found)
