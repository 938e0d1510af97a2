"""How often probabilities come true in simulated worlds: `python tests/decision/simulated_worlds.py [WORLDS]`.

In each world, a law with random constants gives the losses of 12 small runs with noise, to which a law is fitted, and
100 outcomes of a large dense model and a large MoE whose step times differ from their predictions.
"""

import sys

import numpy as np

from moejax.decision.forecast import ClockError, Draws, Ensemble, Forecast, Timed
from moejax.scaling.finished_runs import FinishedRun
from moejax.scaling.fitting import FORMS, fit
from moejax.scaling.shapes import Shape

CLOCK = ClockError(common=0.25, ratio=0.15)
NOISE = 0.01
"""Of a loss, in nats."""

BUDGET, OUTCOMES = 2e21, 100


def unit_cost(active: float, experts: int = 1, cost: float = 1.0) -> Timed:
  """A model whose training on one token takes 6 seconds per active parameter."""
  shape = Shape(active=active, total=active * (1 + 2 / 3 * (experts - 1)), expansion=experts)
  return Timed(name=f"{active:.3g} x {experts}", shape=shape, seconds_per_token=6 * active * cost)


def stated_and_true(worlds: int) -> tuple[np.ndarray, np.ndarray]:
  """The probability that the MoE is better, and the share of the outcomes in which it is, [worlds] each."""
  generator, form = np.random.default_rng(0), FORMS["joint"]
  mean = np.log([1e8, 2e9])
  stated, true = [], []
  for world in range(worlds):
    free = form.center(mean) + 0.5 * np.array(form.width) * generator.standard_normal(len(form.width))
    constants = form.constants(free, mean)

    def loss(shape: Shape, tokens: float, constants=constants) -> float:
      return float(form.loss(constants, shape.active, tokens, shape.expansion)) + NOISE * generator.standard_normal()

    runs = []
    for active, ratio, experts in np.array(np.meshgrid((3e7, 1e8, 3e8), (10, 40), (1, 16))).reshape(3, -1).T:
      shape = unit_cost(active, int(experts)).shape
      runs.append(FinishedRun(name="", shape=shape, tokens=ratio * active, loss=loss(shape, ratio * active)))
    law = fit(form, runs, seed=world, replicates=30, starts=2).law
    dense, sparse = unit_cost(2e9), unit_cost(1.5e9, 16, cost=float(generator.uniform(1.0, 3.5)))
    forecast = Forecast(
      dense=(dense,), sparse=(sparse,), ensemble=Ensemble(laws=(law,), weights={law.name: 1.0}), clock=CLOCK,
      draws=Draws.of(world, 400),
    )  # fmt: skip
    stated.append(forecast.probability(dense, sparse, BUDGET))
    better = 0
    for _ in range(OUTCOMES):
      common, ratio = np.exp(generator.standard_normal(2) * (CLOCK.common, CLOCK.ratio))
      of_dense = loss(dense.shape, BUDGET / (dense.seconds_per_token * common))
      better += loss(sparse.shape, BUDGET / (sparse.seconds_per_token * common * ratio)) < of_dense
    true.append(better / OUTCOMES)
  return np.array(stated), np.array(true)


def main() -> None:
  stated, true = stated_and_true(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
  print("| stated | worlds | mean stated | MoE better |\n|---|---|---|---|")
  for low in np.arange(0, 1, 0.2):
    here = (low <= stated) & (stated < low + 0.2 + (low > 0.7))
    if here.any():
      print(f"| {low:.1f} to {low + 0.2:.1f} | {here.sum()} | {stated[here].mean():.2f} | {true[here].mean():.2f} |")
  print(f"Brier score {np.mean((stated - true) ** 2):.3f}")


if __name__ == "__main__":
  main()
