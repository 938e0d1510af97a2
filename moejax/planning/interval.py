"""How far predictions are from measured step times, as published runs have it.

An error is the logarithm of predicted over published time. The half-width of an 80 % interval is a quantile of the
absolute errors of runs that were predicted without their own time (split conformal prediction, arXiv 1604.04173).
docs/step-time.md has the errors of compiled programs. `python docs/ledger.py ROWS.jsonl --errors` prints those of the
formula, and half-widths.
"""

import math
import statistics

from moejax.config.chips import Chip

HALF_WIDTH = {
  "calibrated": {"dense": 0.39, "moe": 0.39},
  "sister": {"dense": 0.44, "moe": 0.44},
  "formula": {"dense": 0.35, "moe": 0.54},
}
"""Of the logarithm of a step time, at 80 %, by kind of model. calibrated: 12 runs of docs/step-time.md on chips with
runs of their own, each predicted without its own time; only two are of MoE models, so that both kinds have the quantile
of all. sister: 5 TPUs, each with the mean efficiency of the others. formula: 13 dense and 2 MoE runs, for which a
formula takes the place of the compiled program."""

RATIO_ERROR = 0.14
"""Standard deviation of the error of the logarithm of the ratio of two step times on one chip. Errors that both share
cancel. It is the root mean square of the differences between the errors of two runs of one framework on one chip in
docs/step-time.md, of which there are five; the one that is of a dense and an MoE model is 0.14."""


def interval(step_time_s: float, chip: Chip, sparse: bool, formula: bool) -> tuple[float, float]:
  """Lower and upper end of the step times that a prediction stands for, at 80 %.

  Args:
    step_time_s: the prediction.
    chip: what runs the step.
    sparse: whether the model has sparse layers.
    formula: whether the prediction is by formula.
  """
  kind = "formula" if formula or not chip.runs_are_of else "calibrated" if chip.runs_are_of == chip.name else "sister"
  factor = math.exp(HALF_WIDTH[kind]["moe" if sparse else "dense"])
  return step_time_s / factor, step_time_s * factor


def certainty_of_equality(ratio: float, tolerance: float) -> float:
  """Probability that two measured step times differ by at most a relative tolerance, given the predicted ratio."""
  error = statistics.NormalDist(math.log(ratio), RATIO_ERROR)
  return error.cdf(math.log(1 + tolerance)) - error.cdf(math.log(1 - tolerance) if tolerance < 1 else -math.inf)
