"""Which model a pod should train within a budget, with its probability, and what would change the answer."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.config.experiment import Experiment
from moejax.decision.candidates import Candidate, compiled, find_candidates, rescaled
from moejax.decision.forecast import BreakEven, ClockError, Draws, Ensemble, Forecast, crossings
from moejax.decision.measured_decoding import MeasuredDecoding, correction
from moejax.decision.search_space import Space
from moejax.decision.serving import Serving, break_even_tokens, serving
from moejax.errors import UserError
from moejax.notebook import html_table
from moejax.planning.interval import RATIO_ERROR, interval
from moejax.planning.topology import Topology
from moejax.progress import SILENT, Progress
from moejax.scaling.ensemble import Fitted, published_weights
from moejax.scaling.laws import BEST_ACTIVATION, LAWS, Law

DAY_S, HOUR_S = 86_400, 3600

LEAST_DAYS, MOST_DAYS = 1e-6, 1e5

DEVIATIONS = 1.2816
"""Half-width of an 80 % interval in standard deviations."""

LEVELS = (0.1, 0.5, 0.9)
"""Of the quantiles that a decision gives: the median and an 80 % interval."""

MOST_COMPILED = 4
"""Number of finalists that are compiled at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """How long a pod trains, and its price."""

  days: float
  price_per_chip_hour: float | None = None

  def __post_init__(self) -> None:
    if not LEAST_DAYS <= self.days <= MOST_DAYS:
      raise UserError(f"--days={self.days:g} must lie between 0.000001 and 100,000")
    if self.price_per_chip_hour is not None and not 0 <= self.price_per_chip_hour <= 1e9:
      raise UserError(f"--price-per-chip-hour={self.price_per_chip_hour:g} must lie between 0 and 1e9")

  @property
  def seconds(self) -> float:
    return self.days * DAY_S

  def money(self, chips: int, days: float | None = None) -> float | None:
    """The price of the budget, or of this number of days."""
    price = self.price_per_chip_hour
    return None if price is None else price * chips * 24 * (self.days if days is None else days)


def make_budget(topology: Topology, days: float | None, money: float | None, price: float | None) -> Budget:
  """The budget of this many days, or of this price.

  Raises:
    UserError: If not exactly one of days and money is given, or money without a price.
  """
  if (days is None) == (money is None):
    raise UserError("give a budget: either --days X, or --money X with --price-per-chip-hour X")
  if days is None:
    assert money is not None
    if not 0 < money < math.inf:
      raise UserError(f"--money={money:g} must be above 0 and finite")
    if price is None or not price > 0:
      raise UserError(f"--money={money:g} needs --price-per-chip-hour X above 0")
    days = money / (price * 24 * topology.count * topology.slices)
    if not LEAST_DAYS <= days <= MOST_DAYS:
      raise UserError(
        f"--money={money:g} buys {days:.3g} days on {topology.name}, which must lie between {LEAST_DAYS:g} and "
        f"{MOST_DAYS:,.0f}; correct --money or --price-per-chip-hour"
      )
  return Budget(days=days, price_per_chip_hour=price)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LawResult:
  """What one law says about the pair."""

  law: Law
  weight: float
  probability: float
  gap: float
  """Median loss of the dense model minus that of the MoE, in nats."""
  outside: dict[str, float]
  """Factors by which the pair lies outside the range of the law, the larger of both models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
  """The best dense model and the best MoE for a pod and a budget, and which of them is better."""

  topology: Topology
  budget: Budget
  clock: ClockError
  candidates: tuple[Candidate, ...]
  dense: Candidate
  """The dense model with the lowest expected loss."""
  sparse: Candidate
  """The MoE with the lowest expected loss."""
  probability: float
  """Probability that the MoE has the lower loss after the budget."""
  laws: tuple[LawResult, ...]
  gap: tuple[float, float, float]
  """Loss of the dense model minus that of the MoE in nats: 10 %, median and 90 %."""
  speedup: tuple[float, float, float]
  """Time in which the best dense models reach the loss of the MoE, divided by the budget: 10 %, median and 90 %."""
  equal: Candidate | None
  """The dense model that reaches the loss of the MoE first, in the median. None if none does within 64 times the
  budget."""
  break_even: BreakEven
  """When this MoE is more likely to be better than this dense model."""
  turning_days: float | None
  """The nearest budget at which both kinds are equally likely to be better."""
  turning_slowdown: float | None
  """The factor of the MoE's step time at which both are equally likely to be better."""
  curve: tuple[dict[str, Any], ...]
  """The best models and the probability for other budgets."""
  serving: dict[str, Serving]
  """Of the best dense model, the best MoE and the dense model that meets it, by name."""
  notes: tuple[str, ...]
  fitted: Fitted | None
  measured: tuple[MeasuredDecoding, ...] = ()
  """Decoding of trained runs, by which the serving cost of MoE models is corrected."""

  @property
  def winner(self) -> Candidate:
    return self.sparse if self.probability >= 0.5 else self.dense

  @property
  def certainty(self) -> float:
    """Probability that the winner is better."""
    return max(self.probability, 1 - self.probability)

  @property
  def chips(self) -> int:
    return self.topology.count * self.topology.slices

  @property
  def break_even_days(self) -> float | None:
    """Days after which this MoE is more likely to be better than this dense model. 0: at every time considered. None:
    at no time, or only until `break_even.until`."""
    after = self.break_even.after
    return None if after is None else after / DAY_S

  @property
  def turning_load(self) -> float | None:
    """The load of the busiest device, divided by the mean, at which both are equally likely to be better."""
    fraction = self.sparse.loaded_fraction
    if self.turning_slowdown is None or self.turning_slowdown <= 1 or not fraction:
      return None
    return 1 + (self.turning_slowdown - 1) / fraction

  @property
  def saved_device_seconds(self) -> float | None:
    """Device time of training that the MoE saves against the dense model with its loss; below 0 if it costs more."""
    if not math.isfinite(self.speedup[1]):
      return None
    return (self.speedup[1] - 1) * self.budget.seconds * self.topology.devices

  @property
  def break_even_tokens(self) -> float | None:
    """Served tokens at which the MoE and the dense model with its loss cost the same in training and serving."""
    saved = self.saved_device_seconds
    if self.equal is None or saved is None:
      return None
    return break_even_tokens(saved, self.serving[self.equal.name], self.serving[self.sparse.name])

  def _repr_html_(self) -> str:
    rows: list[tuple[str, object]] = [
      ("probability that the MoE is better", self.probability),
      ("gap in nats: 10 %, median, 90 %", self.gap),
      ("speed-up at equal loss: 10 %, median, 90 %", self.speedup),
      ("break-even, days", self.break_even_days),
    ]
    return html_table(f"{self.sparse.name} or {self.dense.name}", rows)


def decide(
  experiments: Sequence[Experiment],
  topology: Topology,
  budget: Budget,
  space: Space,
  *,
  fitted: Fitted | None = None,
  measured: Sequence[MeasuredDecoding] = (),
  compile: bool = False,
  seed: int = 0,
  progress: Progress = SILENT,
) -> Decision:
  """Times the variants of the experiments, finds the best dense model and the best MoE, and compares their losses.

  Args:
    experiments: at least one dense and one MoE experiment.
    topology: the pod.
    budget: the time of training.
    space: the variants of the experiments.
    fitted: laws fitted to finished runs, and the weights of the ensemble. None uses the published laws.
    measured: decoding of trained runs, which corrects the ratio of serving costs.
    compile: whether to compile the best models. Otherwise all step times are by formula.
    seed: seed of the simulation.
    progress: receives progress reports.

  Raises:
    UserError: If no dense or no MoE variant fits on the topology (see `find_candidates`).
  """
  if seed < 0:
    raise UserError(f"--seed={seed} must be 0 or above")
  candidates = find_candidates(experiments, topology, space, progress)
  laws = fitted.laws if fitted else tuple(LAWS.values())
  ensemble = Ensemble(laws=laws, weights=fitted.weights if fitted else published_weights())
  draws = Draws.of(seed)

  def forecast(clock: ClockError) -> Forecast:
    timed = [one.timed for one in candidates]
    return Forecast(
      dense=tuple(one for one in timed if one.shape.is_dense),
      sparse=tuple(one for one in timed if not one.shape.is_dense),
      ensemble=ensemble, clock=clock, draws=draws,
    )  # fmt: skip

  clock = clock_error(topology, formula=True)
  if compile:
    clock = clock_error(topology, formula=False)
    for _ in range(MOST_COMPILED):
      by_formula = [one for one in _finalists(candidates, forecast(clock), budget) if one.source != "program"]
      if not by_formula:
        break
      for finalist in by_formula:
        candidates = rescaled(candidates, compiled(finalist, topology, progress))
  for finalist in _finalists(candidates, forecast(clock), budget):
    if budget.seconds < finalist.step_time_s:
      raise UserError(
        f"--days={budget.days:g} is {budget.seconds:.3g} s, but one step of {finalist.name} takes "
        f"{finalist.step_time_s:.3g} s; give a longer budget"
      )
  progress.stage("simulating losses")
  decision = _decision(candidates, forecast(clock), topology, budget, fitted)
  return _with_measured(decision, tuple(measured)) if measured else decision


def clock_error(topology: Topology, formula: bool) -> ClockError:
  """The errors of predicted step times. Compiled programs have an error of the ratio of two programs on one chip. For
  the formula, the wider interval of MoE models is the common error and an independent error of the ratio."""
  common, of_sparse = (
    math.log(interval(1.0, topology.chip, sparse, formula)[1]) / DEVIATIONS for sparse in (False, True)
  )
  own = math.sqrt(max(0.0, of_sparse**2 - common**2))
  return ClockError(common=common, ratio=max(RATIO_ERROR, own) if formula else RATIO_ERROR)


def _finalists(candidates: Sequence[Candidate], forecast: Forecast, budget: Budget) -> tuple[Candidate, Candidate]:
  by_name = {one.name: one for one in candidates}
  best = (forecast.best(models, budget.seconds) for models in (forecast.dense, forecast.sparse))
  dense, sparse = (by_name[one.name] for one in best)
  return dense, sparse


def _decision(
  candidates: Sequence[Candidate], forecast: Forecast, topology: Topology, budget: Budget, fitted: Fitted | None
) -> Decision:
  seconds, by_name = budget.seconds, {one.name: one for one in candidates}
  dense, sparse = _finalists(candidates, forecast, budget)
  pair = dense.timed, sparse.timed
  gaps = forecast.advantages(*pair, seconds)
  frontier = forecast.frontier(seconds)
  turning = [time for time, _ in crossings([row[0] for row in frontier], [row[3] for row in frontier])]
  speedup = forecast.quantiles(pair, forecast.speedups(pair[1], seconds), LEVELS)
  equal = by_name[forecast.best(forecast.dense, speedup[1] * seconds).name] if math.isfinite(speedup[1]) else None
  low, middle, high = forecast.quantiles(pair, gaps, LEVELS)
  break_even = forecast.break_even(*pair, seconds)
  found = {one.name: serving(one.experiment, topology.chip) for one in (dense, sparse, equal or dense)}
  return Decision(
    topology=topology,
    budget=budget,
    clock=forecast.clock,
    candidates=tuple(candidates),
    dense=dense,
    sparse=sparse,
    probability=forecast.probability(*pair, seconds),
    laws=tuple(_law_results(forecast, pair, seconds, gaps)),
    gap=(low, middle, high),
    speedup=(speedup[0], speedup[1], speedup[2]),
    equal=equal,
    break_even=break_even,
    turning_days=min(turning, key=lambda time: abs(math.log(time / seconds))) / DAY_S if turning else None,
    turning_slowdown=forecast.turning_slowdown(*pair, seconds),
    curve=tuple(_curve(forecast, frontier)),
    serving=found,
    notes=tuple(_notes(forecast, dense, sparse, equal, speedup[1])),
    fitted=fitted,
  )


def _with_measured(decision: Decision, measured: tuple[MeasuredDecoding, ...]) -> Decision:
  """The decision with the serving cost of the MoE corrected."""
  name, factor = decision.sparse.name, correction(measured)
  before = decision.serving[name]
  after = dataclasses.replace(before, step_time_s=before.step_time_s * factor)
  note = (
    f"the serving cost of the MoE is {factor:.2g} times its roofline, relative to dense models, as measured for "
    f"{', '.join(one.run for one in measured)}"
  )
  served = decision.serving | {name: after}
  return dataclasses.replace(decision, serving=served, measured=measured, notes=(*decision.notes, note))


def _law_results(forecast: Forecast, pair: Any, seconds: float, gaps: Any) -> list[LawResult]:
  results = []
  for law, weight in forecast.ensemble.of(pair).items():
    beyond: dict[str, float] = {}
    for model in pair:
      for quantity, factor in law.outside(model.shape, seconds / model.seconds_per_token).items():
        beyond[quantity] = max(factor, beyond.get(quantity, 1.0))
    probability, gap = float(np.mean(gaps[law] > 0)), float(np.median(gaps[law]))
    results.append(LawResult(law=law, weight=weight, probability=probability, gap=gap, outside=beyond))
  return sorted(results, key=lambda one: -one.weight)


def _curve(forecast: Forecast, frontier: Sequence[Any]) -> list[dict[str, Any]]:
  return [
    {
      "days": float(time) / DAY_S,
      "dense": dense.name,
      "moe": sparse.name,
      "probability": probability,
      "gap_nats": forecast.quantiles((dense, sparse), forecast.advantages(dense, sparse, float(time)), LEVELS),
    }
    for time, dense, sparse, probability in frontier
  ]


def _notes(
  forecast: Forecast, dense: Candidate, sparse: Candidate, equal: Candidate | None, speedup: float
) -> list[str]:
  """Cautions about the choice of the candidates."""
  notes = []
  for kind, chosen, models in (("dense", dense, forecast.dense), ("MoE", sparse, forecast.sparse)):
    active = sorted({model.shape.active for model in models})
    size = chosen.timed.shape.active
    if len(active) > 1 and size in (active[0], active[-1]):
      end = "smallest" if size == active[0] else "largest"
      notes.append(f"the best {kind} candidate is the {end}; give further widths, since another may be better")
  largest = max(model.shape.active for model in forecast.dense)
  if not equal or (equal.timed.shape.active == largest and speedup > 1):
    notes.append(
      "a dense model larger than all candidates may reach the loss of the MoE sooner, so that the speed-up is an upper "
      "bound; give further widths"
    )
  shape = sparse.timed.shape
  if not BEST_ACTIVATION / 4 <= shape.active / shape.total <= BEST_ACTIVATION * 4:
    notes.append(
      f"the MoE uses {shape.active / shape.total:.0%} of its parameters per token; arXiv 2506.12119 finds "
      f"{BEST_ACTIVATION:.0%} best at equal parameters, compute and tokens"
    )
  left_out = [
    law.name for law in forecast.ensemble.laws if law not in forecast.ensemble.of((dense.timed, sparse.timed))
  ]
  if left_out:
    notes.append(f"not defined for this pair: the law {' and the law '.join(left_out)}")
  if sparse.experiment.model.moe and sparse.experiment.model.moe.dispatch.has_capacity:
    notes.append(
      "the MoE drops choices of an unbalanced router instead of taking longer; no law has the effect of drops"
    )
  return notes
