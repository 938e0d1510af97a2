"""Pairs each dense scale with the MoE candidate whose step time is nearest, whatever clock gave the step times."""

import dataclasses
from collections.abc import Mapping

from moejax.config.experiment import Pair, Suite


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


def _nearest(pair: Pair, step_times_s: Mapping[str, float], tolerance: float) -> Match:
  dense_s = step_times_s[pair.dense.name]

  def distance(name: str) -> float:
    """Factor by which the slower is slower, so that 0.8 and 1.25 are equally far."""
    return max(step_times_s[name] / dense_s, dense_s / step_times_s[name])

  moe = min((candidate.name for candidate in pair.candidates), key=distance)
  ratio = step_times_s[moe] / dense_s
  return Match(pair.dense.name, moe, ratio, abs(ratio - 1.0) <= tolerance)
