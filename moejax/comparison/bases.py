"""A candidate against its dense model at equal training time, at equal active parameters and tokens, and at equal
training FLOPs, from the same runs.

Z = points of a curve
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from moejax.comparison import fairness, judgement, quantities
from moejax.comparison.fairness import Curve
from moejax.comparison.record import NOT_COMPARABLE, Basis, Member
from moejax.comparison.stages import Result
from moejax.comparison.statistics import Difference, Scores, SeedVariance, differences, ends

EQUAL = ("time", "tokens", "flops")


@dataclasses.dataclass(frozen=True)
class Runs:
  """The finished runs of the members of a comparison."""

  members: Mapping[str, Member]
  results: Mapping[str, Sequence[Result]]
  score: Callable[[Sequence[Result]], Scores]
  """Bits per byte of the runs of a member."""
  seeds: SeedVariance
  tolerance: float
  """Relative difference of active parameters that are considered equal."""
  shorter: Mapping[float, Mapping[str, Sequence[Result]]] = dataclasses.field(default_factory=dict)
  """Results of the runs of shorter budgets, by the fraction of the whole budget."""

  def curve(self, name: str, equal: str) -> Curve | None:
    """Bits per byte of a member against time, tokens or FLOPs. None if it is not trained or has no training loss."""
    results = self.results.get(name, ())
    known = [result.relative_Z for result in results if result.relative_Z is not None]
    if not results or len(known) < len(results):
      return None
    scores = [float(score) for score in self.score(results).by_seed]
    seeds = _seeds(results)
    # While a comparison runs, a shorter budget may be finished with fewer seeds, whose mean is not that of all.
    shorter = {part: of[name] for part, of in self.shorter.items() if _seeds(of.get(name, ())) == seeds}
    finished = {part: self.score(of).value for part, of in shorter.items()}
    return fairness.curve(known, scores, *_amounts(self.members[name], equal), finished)

  def half_width(self, dense: str, other: str) -> float:
    """Half of the interval of the difference of two dense members."""
    found = differences(self.score(self.results[dense]), {other: self.score(self.results[other])}, self.seeds)[other]
    return found.high - found.value


def bases(runs: Runs, dense: str, candidate: str, difference: Difference) -> tuple[Basis, ...]:
  """The comparison by each kind of fairness. Empty if a run has no training loss.

  If a candidate does not have as many active parameters as its dense model, it is compared at equal tokens with a
  dense model of its size, whose bits per byte are interpolated between two dense members of the suite. If there are no
  such members, it is not compared.

  Args:
    runs: finished runs.
    dense: name of the dense member.
    candidate: name of the candidate.
    difference: difference of the candidate after whole runs.
  """
  found = []
  for equal in EQUAL:
    of_dense, of_candidate = runs.curve(dense, equal), runs.curve(candidate, equal)
    if of_dense is None or of_candidate is None:
      continue
    half, note = difference.high - difference.value, None
    if equal == "tokens" and not _as_large(runs, dense, candidate):
      reference = _dense_of_size(runs, dense, candidate, of_dense)
      if reference is None:
        found.append(Basis(equal=equal, outcome=NOT_COMPARABLE, note=_sizes(runs, dense, candidate)))
        continue
      of_dense, more, note = reference
      half += more
    found.append(_basis(equal, of_dense, of_candidate, half, note))
  return tuple(found)


def _basis(equal: str, dense: Curve, candidate: Curve, half: float, note: str | None) -> Basis:
  compared = fairness.equal(dense, candidate, half)
  interval = ends(*compared.interval)
  return Basis(
    equal=equal,
    at=compared.at,
    bits_per_byte_difference=compared.difference,
    bits_per_byte_difference_interval=interval,
    outcome=judgement.better(interval),
    factor=compared.factor.value,
    factor_interval=compared.factor.interval,
    note=note,
  )


def _as_large(runs: Runs, dense: str, candidate: str) -> bool:
  low, high = judgement.limits(runs.tolerance)
  return low <= _active(runs, candidate) / _active(runs, dense) <= high


def _dense_of_size(runs: Runs, dense: str, candidate: str, own: Curve) -> tuple[Curve, float, str] | None:
  """The curve of a dense model with as many active parameters as the candidate, by which the interval becomes wider,
  and where it comes from. It is interpolated, against the logarithm of active parameters, between the dense model and
  the next dense member on the other side of the candidate. None if there is no such member."""
  size, here = _active(runs, candidate), _active(runs, dense)
  others = [
    (_active(runs, name), name)
    for name, member in runs.members.items()
    if member.kind == "dense" and (_active(runs, name) - size) * (here - size) < 0 and _on_same_text(runs, dense, name)
  ]
  there, other = min(others, key=lambda found: abs(math.log(found[0] / size)), default=(0.0, ""))
  of_other = runs.curve(other, "tokens") if other else None
  if of_other is None:
    return None
  part = math.log(size / here) / math.log(there / here)
  more = part * runs.half_width(dense, other)
  note = (
    f"against a dense model of {quantities.count(size)} active parameters, interpolated between {dense} "
    f"({quantities.count(here)}) and {other} ({quantities.count(there)})"
  )
  return fairness.between(own, of_other, part), more, note


def _on_same_text(runs: Runs, one: str, other: str) -> bool:
  """Whether two members have runs that were scored on the same text."""
  texts = [result.held_out.targets.tolist() for name in (one, other) for result in runs.results.get(name, ())[:1]]
  return len(texts) == 2 and texts[0] == texts[1]


def _sizes(runs: Runs, dense: str, candidate: str) -> str:
  return (
    f"{candidate} has {quantities.count(_active(runs, candidate))} active parameters and {dense} "
    f"{quantities.count(_active(runs, dense))}, and no other dense member of the suite lies beyond it"
  )


def _seeds(results: Sequence[Result]) -> list[int]:
  return [result.summary["seed"] for result in results]


def _active(runs: Runs, name: str) -> float:
  return runs.members[name].parameters_active or math.nan


def _amounts(member: Member, equal: str) -> tuple[float, float]:
  """Time, tokens or model FLOPs of a whole run, and those of its parent that count."""
  if equal == "time":
    return member.train_time_s or 0.0, member.counted("time_s")
  if equal == "tokens":
    return member.tokens or 0.0, member.counted("tokens")
  return member.train_flops, member.counted("flops")
