"""Equal step time, whatever clock gave it: which candidate is nearest, and which value of a field comes nearest."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from moejax.config.experiment import Pair, Suite

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Match:
  """A dense experiment and the candidate nearest to it in step time."""

  dense: str
  moe: str
  step_time_ratio: float
  """MoE over dense."""
  within_tolerance: bool


def match(suite: Suite, step_times_s: Mapping[str, float]) -> list[Match]:
  """The nearest candidate of each pair, by the ratio of step times, and whether it is near enough.

  Args:
    suite: pairs and tolerance.
    step_times_s: step time of each member, measured or predicted.
  """
  return [_nearest(pair, step_times_s, suite.tolerance) for pair in suite.pairs]


def compared(dense: str, moe: str, step_times_s: Mapping[str, float], tolerance: float) -> Match:
  """How far apart two step times are, and whether that counts as equal."""
  ratio = step_times_s[moe] / step_times_s[dense]
  return Match(dense, moe, ratio, abs(ratio - 1.0) <= tolerance)


def distance(step_time_s: float, target_s: float) -> float:
  """Factor by which the slower is slower, so that 0.8 and 1.25 are equally far."""
  return max(step_time_s / target_s, target_s / step_time_s)


def approach(
  target_s: float,
  ladder: Sequence[Value],
  clock: Callable[[Value], float | None],
  tolerance: float,
  first: int | None = None,
) -> tuple[Value, float] | None:
  """The value whose step time is nearest to the target, or the first that is within tolerance of it; None if none runs.

  Each next value is where a line through the nearest faster and the nearest slower one meets the target, so that a
  measurement of minutes is made only a few times, not for every value.

  Args:
    target_s: the step time to reach.
    ladder: values in order of their step time, the fastest first.
    clock: step time of a value, None where it cannot run, as when it does not fit; larger ones then cannot either.
    tolerance: relative difference that counts as equal.
    first: position in the ladder to begin with, such as one whose step time is known; else the middle.
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
  """The next position between `low` and `high`: where step time grows along a line, else the middle."""
  below, above = tried.get(low - 1), tried.get(high + 1)
  if below is None or above is None or above <= below:
    return (low + high) // 2
  part = (target_s - below) / (above - below)
  return min(high, max(low, low - 1 + math.floor(part * (high - low + 2) + 0.5)))


def _nearest(pair: Pair, step_times_s: Mapping[str, float], tolerance: float) -> Match:
  target_s = step_times_s[pair.dense.name]
  moe = min((candidate.name for candidate in pair.candidates), key=lambda name: distance(step_times_s[name], target_s))
  return compared(pair.dense.name, moe, step_times_s, tolerance)
