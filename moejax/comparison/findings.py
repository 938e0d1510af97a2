"""Formulates the findings of a comparison."""

from collections.abc import Sequence

from moejax.comparison.match import Match
from moejax.comparison.record import MatchedPair
from moejax.evaluation.held_out import Difference

BEYOND_NOISE = 2.0
"""Two models differ significantly if their paired difference exceeds this number of standard errors."""


def verdict(match: Match, difference: Difference | None, tolerance: float) -> str:
  """A sentence about a pair. `difference` is MoE minus dense, or None until both members are trained."""
  if not match.within_tolerance:
    equal = (
      f"no candidate matches {match.dense} within {tolerance:.0%}: the closest is {match.moe} at "
      f"{match.step_time_ratio:.2f} times its step time"
    )
  else:
    equal = f"{match.moe} matches {match.dense} at {match.step_time_ratio:.2f} times its step time"
  if difference is None:
    return f"{equal}; not trained yet"
  return f"{equal}; {_difference(match, difference)}"


def finding(pairs: Sequence[MatchedPair]) -> str:
  """A sentence about all pairs."""
  trained = [pair for pair in pairs if pair.bits_per_byte_difference is not None]
  if len(trained) < len(pairs):
    return f"{len(pairs) - len(trained)} of {len(pairs)} pairs are not trained yet."
  matched = [pair for pair in pairs if pair.within_tolerance]
  if not matched:
    return "No MoE candidate matches the step time of a dense model within the tolerance, so no pair can be compared."
  better = [pair for pair in matched if _sign(pair) < 0]
  worse = [pair for pair in matched if _sign(pair) > 0]
  even = [pair for pair in matched if _sign(pair) == 0]
  parts = []
  if better:
    parts.append(f"the MoE is better at {_scales(better)}")
  if worse:
    parts.append(f"the dense model is better at {_scales(worse)}")
  if even:
    parts.append(f"there is no significant difference at {_scales(even)}")
  unmatched = [pair.dense for pair in pairs if not pair.within_tolerance]
  tail = f"; no candidate matches the step time of {', '.join(unmatched)}" if unmatched else ""
  return f"At equal step time and equal training time, {', and '.join(parts)}{tail}."


def _difference(match: Match, difference: Difference) -> str:
  bits, stderr = difference.bits_per_byte_difference, difference.bits_per_byte_difference_stderr
  size = f"{abs(bits):.3f} ± {stderr:.3f} bits per byte"
  if not _beyond_noise(bits, stderr):
    return f"no significant difference ({bits:+.3f} ± {stderr:.3f} bits per byte)"
  better, worse = (match.moe, match.dense) if bits < 0 else (match.dense, match.moe)
  return f"in the same training time {better} is better than {worse} by {size}"


def _sign(pair: MatchedPair) -> int:
  """-1 if the MoE is significantly better, 1 if the dense model is, and 0 if neither is."""
  bits, stderr = pair.bits_per_byte_difference, pair.bits_per_byte_difference_stderr
  assert bits is not None and stderr is not None  # it is trained
  return (1 if bits > 0 else -1) if _beyond_noise(bits, stderr) else 0


def _beyond_noise(bits: float, stderr: float) -> bool:
  """Whether a difference is significant. False if the standard error is unknown (NaN, for a single document)."""
  return abs(bits) > BEYOND_NOISE * stderr


def _scales(pairs: list[MatchedPair]) -> str:
  return ", ".join(
    f"{pair.dense} ({pair.bits_per_byte_difference:+.3f} ± {pair.bits_per_byte_difference_stderr:.3f} bits per byte)"
    for pair in pairs
  )
