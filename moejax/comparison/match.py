"""Matches models at equal step time, whether measured or predicted."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from moejax.config.experiment import Pair, Suite

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Match:
  """A dense experiment and the candidate with the closest step time."""

  dense: str
  moe: str
  step_time_ratio: float
  """Step time of the MoE divided by that of the dense model."""
  within_tolerance: bool


def match(suite: Suite, step_times_s: Mapping[str, float]) -> list[Match]:
  """The candidate of each pair with the closest step time, and whether it is equal within the tolerance.

  Args:
    suite: pairs and tolerance.
    step_times_s: step time of each member, measured or predicted.
  """
  return [_nearest(pair, step_times_s, suite.tolerance) for pair in suite.pairs]


def compared(dense: str, moe: str, step_times_s: Mapping[str, float], tolerance: float) -> Match:
  """Compares two step times, and whether they are equal within the tolerance."""
  ratio = step_times_s[moe] / step_times_s[dense]
  return Match(dense, moe, ratio, abs(ratio - 1.0) <= tolerance)


def distance(step_time_s: float, target_s: float) -> float:
  """The ratio of the slower to the faster time, so that 0.8 and 1.25 are equally distant from 1."""
  return max(step_time_s / target_s, target_s / step_time_s)


def approach(
  target_s: float,
  ladder: Sequence[Value],
  clock: Callable[[Value], float | None],
  tolerance: float,
  first: int | None = None,
) -> tuple[Value, float] | None:
  """Searches for the value whose step time is closest to the target, or within the tolerance. None if no value can run.

  The next value is found by linear interpolation between the closest faster and the closest slower value, so that few
  values need to be timed.

  Args:
    target_s: the step time to reach.
    ladder: values in order of their step time, the fastest first.
    clock: returns the step time of a value, or None if it cannot run, for example because it does not fit. Larger
      values then cannot run either.
    tolerance: relative difference that is considered equal.
    first: position in the ladder to start at, such as one with a known step time. None means the middle.
  """
  low, high = 0, len(ladder) - 1
  tried: dict[int, float] = {}
  at = (low + high) // 2 if first is None else first
  while low <= high:
    seconds = clock(ladder[at])
    if seconds is not None:
      tried[at] = seconds
      if abs(seconds / target_s - 1.0) <= tolerance:
        break
    low, high = (at + 1, high) if seconds is not None and seconds < target_s else (low, at - 1)
    at = _next(target_s, tried, low, high)
  if not tried:
    return None
  best = min(tried, key=lambda i: distance(tried[i], target_s))
  return ladder[best], tried[best]


def _next(target_s: float, tried: Mapping[int, float], low: int, high: int) -> int:
  """The next position between `low` and `high`: by linear interpolation if possible, else the middle."""
  below, above = tried.get(low - 1), tried.get(high + 1)
  if below is None or above is None or above <= below:
    return (low + high) // 2
  part = (target_s - below) / (above - below)
  return min(high, max(low, low - 1 + math.floor(part * (high - low + 2) + 0.5)))


def _nearest(pair: Pair, step_times_s: Mapping[str, float], tolerance: float) -> Match:
  target_s = step_times_s[pair.dense.name]
  moe = min((candidate.name for candidate in pair.candidates), key=lambda name: distance(step_times_s[name], target_s))
  return compared(pair.dense.name, moe, step_times_s, tolerance)
