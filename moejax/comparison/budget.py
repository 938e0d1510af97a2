"""The budget of each pair: the compute-optimal training time of its dense model."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from moejax.comparison.match import Match
from moejax.config.experiment import Experiment, Pair, Suite
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Allotment:
  """The training budget of one member."""

  name: str
  pair: str
  """Name of the dense member whose training time is the budget."""
  budget_s: float
  """Training time in seconds: the steps of the dense member times its step time."""
  steps: int
  """Number of steps that fit into that time at the step time of this member. For an upcycled candidate whose parent
  counts, those that fit into the rest of it."""
  tokens: int
  """Number of targets of weight 1 in these steps, without padding."""
  trained: bool
  """False for a candidate that the suite does not train because another candidate has a closer step time."""


class Counter(Protocol):
  """Counts training tokens. `TargetCounter` implements it for a corpus."""

  def steps(self, experiment: Experiment) -> int: ...
  def tokens(self, experiment: Experiment, steps: int) -> int: ...


def allot(suite: Suite, matches: list[Match], step_times_s: Mapping[str, float], counter: Counter) -> list[Allotment]:
  """The budgets of all members. Each dense member is followed by its candidates.

  Args:
    suite: the suite.
    matches: the candidate with the closest step time of each pair.
    step_times_s: step time of each member.
    counter: counts the tokens of the corpus.

  Raises:
    UserError: If a step of a candidate takes longer than the whole budget.
  """
  return [
    _allotment(
      experiment, pair, step_times_s, counter, trained=suite.train == "all" or experiment.name in (m.dense, m.moe)
    )
    for pair, m in zip(suite.pairs, matches, strict=True)
    for experiment in (pair.dense, *pair.candidates)
  ]


def _allotment(
  experiment: Experiment, pair: Pair, step_times_s: Mapping[str, float], counter: Counter, trained: bool
) -> Allotment:
  dense, start = pair.dense, pair.start(experiment.name)
  of_dense = counter.steps(dense)
  budget_s = of_dense * step_times_s[dense.name]
  own_s = start.own_fraction * budget_s if start else budget_s
  fitting = of_dense if experiment is dense else steps_within(own_s, experiment, dense, step_times_s)
  return Allotment(experiment.name, dense.name, budget_s, fitting, counter.tokens(experiment, fitting), trained)


def steps_within(budget_s: float, experiment: Experiment, dense: Experiment, step_times_s: Mapping[str, float]) -> int:
  """The number of steps of an experiment that fit into a time.

  Raises:
    UserError: If one step takes longer.
  """
  fitting = int(budget_s / step_times_s[experiment.name])
  if fitting == 0:
    raise UserError(
      f"one step of {experiment.name} takes {step_times_s[experiment.name]:.3g} s, but the budget of {dense.name} is "
      f"{budget_s:.3g} s; give the dense model more tokens or the candidate fewer parameters"
    )
  return fitting
