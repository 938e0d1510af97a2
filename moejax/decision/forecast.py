"""The distribution of the losses of dense and MoE models that train on a pod for a given time, by Monte Carlo.

A draw has an error of the step times and, for each law, errors of the losses. Every law is simulated with the same
draws, and a probability is the mean of those of the laws by their weights.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moejax.scaling.laws import Array, Law
from moejax.scaling.shapes import Shape

DRAWS = 2000

GRID = np.exp2(np.arange(-24, 25) / 4)
"""Times, as multiples of the budget, at which the best models are compared: 1/64 to 64."""

LARGEST_FACTOR = 64.0
"""The largest change of a step time that is considered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
  """A model and the time in which a pod trains it on one token."""

  name: str
  shape: Shape
  seconds_per_token: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClockError:
  """Standard deviations of the logarithm of measured over predicted step time."""

  common: float
  """Of the error that dense and MoE models share."""
  ratio: float
  """Of the ratio of an MoE's step time to a dense model's."""


@dataclasses.dataclass(frozen=True)
class Draws:
  """Standard normal numbers, [draws] each."""

  common: Array
  ratio: Array
  dense: Array
  """Of the errors of the losses of dense models."""
  sparse: Array

  @classmethod
  def of(cls, seed: int, count: int = DRAWS) -> "Draws":
    return cls(*np.random.default_rng(seed).standard_normal((4, count)))

  def clock(self, model: Timed, error: ClockError) -> Array:
    """Measured over predicted step time of each draw."""
    return np.exp(error.common * self.common + (0.0 if model.shape.is_dense else error.ratio * self.ratio))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble:
  """Laws with weights."""

  laws: tuple[Law, ...]
  weights: Mapping[str, float]

  def of(self, models: Sequence[Timed], choosing: bool = False) -> dict[Law, float]:
    """The laws that are defined for all models, with weights that add up to 1. `choosing`: only those that can choose
    between sizes."""
    fitting = [law for law in self.laws if all(law.applies(model.shape) for model in models)]
    fitting = [law for law in fitting if law.has_tokens or not choosing]
    total = sum(self.weights[law.name] for law in fitting)
    return {law: self.weights[law.name] / total for law in fitting}


@dataclasses.dataclass(frozen=True)
class BreakEven:
  """The seconds from which on an MoE is more likely to be better than a dense model, and those from which on it is not.
  One of them is None. 0: at every time considered."""

  after: float | None
  until: float | None

  def words(self, shown: Callable[[float], str]) -> str:
    """A clause about this MoE. `shown` formats seconds."""
    if self.after is None:
      assert self.until is not None
      if not self.until:
        return "this MoE is not more likely to be better than this dense model at any time considered"
      return f"this MoE is more likely to be better than this dense model until {shown(self.until)}, and not after that"
    if not self.after:
      return "this MoE is more likely to be better than this dense model at every time considered"
    return f"this MoE is more likely to be better than this dense model after {shown(self.after)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
  """What a simulation of dense and MoE models needs."""

  dense: tuple[Timed, ...]
  sparse: tuple[Timed, ...]
  ensemble: Ensemble
  clock: ClockError
  draws: Draws

  def best(self, models: Sequence[Timed], seconds: float) -> Timed:
    """The model with the lowest expected loss after this time."""
    laws = self.ensemble.of((*self.dense, *self.sparse), choosing=True)

    def expected(model: Timed) -> float:
      tokens = np.array([seconds / model.seconds_per_token])
      return sum(weight * float(law.loss(model.shape, tokens)[0]) for law, weight in laws.items())

    return min(models, key=expected)

  def losses(self, model: Timed, law: Law, seconds: float, slowdown: float = 1.0) -> Array:
    """The loss of each draw after training for this time, with a step time that is `slowdown` times the prediction."""
    planned = seconds / (model.seconds_per_token * slowdown)
    tokens = planned / self.draws.clock(model, self.clock)
    error = self.draws.dense if model.shape.is_dense else self.draws.sparse
    return (law.draws or law.loss)(model.shape, tokens) + law.spread(model.shape, planned) * error

  def advantages(self, dense: Timed, sparse: Timed, seconds: float, slowdown: float = 1.0) -> dict[Law, Array]:
    """Loss of the dense model minus that of the MoE, whose step time has the `slowdown`, by law."""
    return {
      law: self.losses(dense, law, seconds) - self.losses(sparse, law, seconds, slowdown)
      for law in self.ensemble.of((dense, sparse))
    }

  def probability(self, dense: Timed, sparse: Timed, seconds: float, slowdown: float = 1.0) -> float:
    """Probability that the MoE has the lower loss after this time."""
    return self.mean(
      (dense, sparse),
      {law: float(np.mean(gap > 0)) for law, gap in self.advantages(dense, sparse, seconds, slowdown).items()},
    )

  def mean(self, models: Sequence[Timed], by_law: Mapping[Law, float]) -> float:
    """The mean of one number of each law, by weight."""
    return sum(weight * by_law[law] for law, weight in self.ensemble.of(models).items())

  def quantiles(self, models: Sequence[Timed], by_law: Mapping[Law, Array], at: Sequence[float]) -> list[float]:
    """Quantiles of the mixture of the draws of each law."""
    laws = self.ensemble.of(models)
    values = np.concatenate([by_law[law] for law in laws])
    weights = np.concatenate([np.full(len(by_law[law]), laws[law] / len(by_law[law])) for law in laws])
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return [float(values[order][min(int(np.searchsorted(cumulative, level)), len(values) - 1)]) for level in at]

  def frontier(self, seconds: float) -> list[tuple[float, Timed, Timed, float]]:
    """For each time of the grid: the time, the best dense model, the best MoE, and the probability of the MoE."""
    rows = []
    for factor in GRID:
      dense, sparse = self.best(self.dense, factor * seconds), self.best(self.sparse, factor * seconds)
      rows.append((factor * seconds, dense, sparse, self.probability(dense, sparse, factor * seconds)))
    return rows

  def speedups(self, sparse: Timed, seconds: float) -> dict[Law, Array]:
    """The time in which the best dense model of each time reaches the loss of the MoE after `seconds`, divided by
    `seconds`, by law: at least 1/64, and infinite beyond 64."""
    steps = [(factor, self.best(self.dense, factor * seconds)) for factor in GRID]
    found = {}
    for law in self.ensemble.of((sparse, *(dense for _, dense in steps))):
      target = self.losses(sparse, law, seconds)
      curve = np.stack([self.losses(dense, law, factor * seconds) for factor, dense in steps])
      found[law] = _first_below(np.minimum.accumulate(curve), target)
    return found

  def break_even(
    self, dense: Timed, sparse: Timed, seconds: float, offsets: Mapping[Law, float] | None = None
  ) -> "BreakEven":
    """When this MoE is more likely to be better than this dense model than worse: where the median of the gap of their
    losses is above 0. `offsets` are added to the gap of each law."""
    pair, middles = (dense, sparse), []
    for factor in GRID:
      gaps = self.advantages(*pair, float(factor * seconds))
      moved = {law: gap + (offsets or {}).get(law, 0.0) for law, gap in gaps.items()}
      middles += self.quantiles(pair, moved, (0.5,))
    worse = [-middle or 1e-12 for middle in middles]  # 0 is not better
    return BreakEven(last_rise(GRID * seconds, middles), last_rise(GRID * seconds, worse))

  def turning_slowdown(self, dense: Timed, sparse: Timed, seconds: float) -> float | None:
    """The factor of the MoE's step time at which both models are equally likely to be better. None beyond 64."""
    low, high = 1 / LARGEST_FACTOR, LARGEST_FACTOR
    if not self.probability(dense, sparse, seconds, high) < 0.5 < self.probability(dense, sparse, seconds, low):
      return None
    while high / low > 1.005:
      middle = math.sqrt(low * high)
      low, high = (middle, high) if self.probability(dense, sparse, seconds, middle) > 0.5 else (low, middle)
    return math.sqrt(low * high)


def _first_below(curve: Array, target: Array) -> Array:
  """Where a falling curve [grid, draws] first reaches a target [draws], interpolated between the points of GRID."""
  below = curve <= target
  first = np.argmax(below, axis=0)
  columns = np.arange(curve.shape[1])
  before, after = curve[np.maximum(first - 1, 0), columns], curve[first, columns]
  part = np.where(before > after, (before - target) / np.where(before > after, before - after, 1.0), 1.0)
  log = np.log(GRID)
  reached = np.exp(log[np.maximum(first - 1, 0)] + part * (log[first] - log[np.maximum(first - 1, 0)]))
  return np.where(below[0], GRID[0], np.where(below.any(axis=0), reached, np.inf))


def last_rise(times: Array, values: Sequence[float]) -> float | None:
  """The time after which all values are above 0, interpolated; 0 if all are, None if the last is not."""
  above = np.array(values) > 0
  if not above[-1]:
    return None
  if above.all():
    return 0.0
  last = int(np.flatnonzero(~above)[-1])
  part = -values[last] / (values[last + 1] - values[last])
  return float(np.exp(np.log(times[last]) + part * np.log(times[last + 1] / times[last])))


def crossings(times: Sequence[float], probabilities: Sequence[float]) -> list[tuple[float, bool]]:
  """Times at which a probability crosses 1/2, and whether it rises there."""
  found = []
  levels: list[Any] = [p - 0.5 for p in probabilities]
  for i in range(len(levels) - 1):
    if (levels[i] > 0) != (levels[i + 1] > 0):
      part = levels[i] / (levels[i] - levels[i + 1])
      found.append((math.exp(math.log(times[i]) + part * math.log(times[i + 1] / times[i])), levels[i + 1] > 0))
  return found
