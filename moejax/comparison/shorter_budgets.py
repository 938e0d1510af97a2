"""Compares the members of a pair after shorter training budgets, which are branches of their runs."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from moejax.comparison import judgement
from moejax.comparison.against import Results, bits
from moejax.comparison.record import NOT_ESTABLISHED, Against, MatchedPair, Shorter
from moejax.comparison.stages import Result
from moejax.comparison.statistics import differences, seed_variance


def with_shorter_budgets(
  pair: MatchedPair, results: Mapping[float, Results], budget_s: float, tolerance: float
) -> MatchedPair:
  """The pair with its comparison at each shorter budget for which its members are trained.

  Intervals are those of `differences`, with the variance between seeds of the branches of this budget, and hold for
  each budget alone.

  Args:
    pair: the pair at the whole budget.
    results: results of the branches of each member, by the fraction of the budget.
    budget_s: the whole budget.
    tolerance: relative difference of times that are considered equal.
  """
  found: dict[str, list[Shorter]] = {}
  for fraction in sorted(results):
    of_members = results[fraction]
    dense = of_members.get(pair.dense, ())
    seeds = seed_variance([bits(each) for each in of_members.values() if each])
    trained = {c.moe: bits(of_members[c.moe]) for c in pair.candidates if dense and c.moe and of_members.get(c.moe)}
    for name, difference in (differences(bits(dense), trained, seeds) if trained else {}).items():
      against, whole = pair.against(name), _time(of_members[name]) / _time(dense)
      low, high = judgement.limits(tolerance)
      equal = against is not None and judgement.has_equal_steps(against, tolerance) and low <= whole <= high
      shorter = Shorter(
        budget=fraction,
        budget_s=fraction * budget_s,
        bits_per_byte=trained[name].value,
        bits_per_byte_dense=bits(dense).value,
        bits_per_byte_difference=difference.value,
        bits_per_byte_difference_interval=difference.interval,
        whole_run_ratio=whole,
        outcome=judgement.better(difference.interval) if equal else NOT_ESTABLISHED,
      )
      found.setdefault(name, []).append(shorter)

  def of(against: Against) -> tuple[Shorter, ...]:
    return tuple(found.get(str(against.moe), ()))

  candidates = tuple(dataclasses.replace(c, shorter_budgets=of(c)) for c in pair.candidates)
  return dataclasses.replace(pair, shorter_budgets=of(pair), candidates=candidates)


def _time(results: Sequence[Result]) -> float:
  return statistics.fmean(result.summary["train_time_s"] for result in results)
