"""Puts the outcome of a comparison into words: the one statement that the terminal, the page, the figures and
comparison.json show."""

from collections.abc import Sequence

from moejax.comparison.quantities import interval, percent, ratio, signed_interval
from moejax.comparison.record import CANDIDATE, DENSE, NO_DIFFERENCE, Against, MatchedPair

CERTAINTY = "Intervals are at 95 %, over seeds and held-out documents, and hold for all candidates of a pair together."


def with_certainty(finding: str | None) -> str:
  """A finding as figures state it, which are shown without the page."""
  return f"{finding} {CERTAINTY}" if finding else ""


def verdict(pair: MatchedPair, tolerance: float) -> str:
  """Sentences about a pair."""
  if pair.bits_per_byte_difference is None:
    return f"{_times(pair, pair.dense, tolerance)}; not trained yet"
  shown = (pair.against(pair.best) if pair.best else None) or pair
  others = sum(candidate.bits_per_byte_difference is not None for candidate in pair.candidates) > 1
  best = f"{shown.moe}, the best candidate with its step time," if others and pair.best else f"{shown.moe}"
  if pair.outcome == CANDIDATE:
    said = f"{shown.moe} is better than {pair.dense} at equal step time, by {_size(shown)}"
  elif pair.outcome == DENSE:
    said = f"{pair.dense} is better than {best} at equal step time, by {_size(shown)}"
  elif pair.outcome == NO_DIFFERENCE:
    said = f"no difference found between {pair.dense} and {best} at equal step time: {_difference(shown)}"
    if shown.bits_per_byte_detectable is not None:
      said += f"; a difference of {shown.bits_per_byte_detectable:.3f} would have been found with a probability of 80 %"
  else:
    reasons = "; ".join(shown.notes) or "the comparison at equal time gives another result"
    return f"not established: {reasons} (measured difference of {shown.moe}: {_difference(shown)})"
  start = [f"{shown.moe} is {shown.start}"] if shown.start else []
  return "; ".join([said, _times(shown, pair.dense, tolerance), *start, *shown.notes])


def finding(pairs: Sequence[MatchedPair]) -> str:
  """A sentence about all pairs."""
  trained = [pair for pair in pairs if pair.bits_per_byte_difference is not None]
  if len(trained) < len(pairs):
    return f"{len(pairs) - len(trained)} of {len(pairs)} pairs are not trained yet."
  words = {
    CANDIDATE: "the MoE is better at",
    DENSE: "the dense model is better at",
    NO_DIFFERENCE: "no difference was found at",
  }
  parts = []
  for outcome, text in words.items():
    if of_outcome := [pair for pair in pairs if pair.outcome == outcome]:
      parts.append(f"{text} {', '.join(map(_scale, of_outcome))}")
  open_pairs = [pair.dense for pair in pairs if pair.outcome not in words]
  if not parts:
    return f"At equal step time and equal training time, nothing is established for {', '.join(open_pairs)}."
  if open_pairs:
    parts.append(f"nothing is established for {', '.join(open_pairs)}")
  return f"At equal step time and equal training time, {'; '.join(parts)}."


def _scale(pair: MatchedPair) -> str:
  shown = (pair.against(pair.best) if pair.best else None) or pair
  start = f", {shown.start}" if shown.start else ""
  return f"{pair.dense} ({_difference(shown)} with {shown.moe}{start})"


def _times(against: Against, dense: str, tolerance: float) -> str:
  """The step time of a candidate relative to that of its dense model."""
  times = f"{ratio(against.step_time_ratio)} ({interval(against.step_time_ratio_interval)})"
  within = "within" if against.within_tolerance else "not within"
  return f"the step time of {against.moe} is {times} times that of {dense}, {within} {percent(tolerance, 0)}"


def _difference(against: Against) -> str:
  ends = against.bits_per_byte_difference_interval
  return f"{signed_interval(against.bits_per_byte_difference, ends)} bits per byte"


def _size(against: Against) -> str:
  """The size of a difference whose sign has been said."""
  value, ends = against.bits_per_byte_difference or 0.0, against.bits_per_byte_difference_interval or (None, None)
  low, high = sorted(abs(end or 0.0) for end in ends)
  return f"{abs(value):.3f} ({low:.3f} to {high:.3f}) bits per byte"
