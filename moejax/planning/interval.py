"""How far predictions are from measured step times, as published runs have it, or the user's own.

An error is the logarithm of predicted over published time. The half-width of an 80 % interval is a quantile of the
absolute errors of runs that were predicted without their own time (split conformal prediction, arXiv 1604.04173).
`python docs/half_widths.py` prints these errors and the constants below.
"""

import math
import statistics
from collections.abc import Sequence

from moejax.config.chips import Chip
from moejax.planning.calibrated_chip import calibration_of

HALF_WIDTH = {
  "calibrated": {"dense": 0.37, "moe": 0.37},
  "sister": {"dense": 0.37, "moe": 0.37},
  "formula": {"dense": 0.26, "moe": 0.59},
}
"""Of the logarithm of a step time, at 80 %, by kind of model. calibrated: 17 runs of docs/step-time.md on chips with
other runs; only one is of an MoE model, so that both kinds have the quantile of all. sister: 7 runs on TPU, each with
the mean efficiency of the other TPUs, or as calibrated if that is wider. formula: 13 dense and 2 MoE runs of
docs/ledger.jsonl, for which a formula takes the place of the compiled program."""

RATIO_ERROR = 0.19
"""Standard deviation of the error of the logarithm of the ratio of two step times on one chip: the root mean square of
the differences between the errors of two runs of one framework on one chip in docs/step-time.md, of which there are
twelve. Errors that both share cancel."""

COVERAGE = 0.8

FEW = 1.25
"""Factor of the largest error if there are too few for a quantile."""


def half_width(errors: Sequence[float]) -> float:
  """Half-width of an 80 % interval: of n absolute errors the k-th smallest, k = ceil(0.8 (n + 1)); if that is more than
  n, the largest, times FEW."""
  ordered = sorted(map(abs, errors))
  k = math.ceil(COVERAGE * (len(ordered) + 1))
  return ordered[k - 1] if k <= len(ordered) else FEW * ordered[-1]


def interval(step_time_s: float, chip: Chip, sparse: bool, formula: bool) -> tuple[float, float]:
  """The 80 % prediction interval of a step time.

  Args:
    step_time_s: the prediction.
    chip: the chip.
    sparse: whether the model has sparse layers.
    formula: whether the prediction is by formula.
  """
  calibration = calibration_of(chip)
  own = None if formula or not calibration else calibration.half_width
  factor = math.exp(HALF_WIDTH[basis(chip, formula)]["moe" if sparse else "dense"] if own is None else own)
  return step_time_s / factor, step_time_s * factor


def basis(chip: Chip, formula: bool) -> str:
  """What a prediction rests on, a key of HALF_WIDTH: a file of measurements that has train steps is as good as runs of
  the chip, one of single operations as runs of a similar chip."""
  if formula:
    return "formula"
  calibration = calibration_of(chip)
  if calibration is not None:
    return "calibrated" if calibration.runs else "sister"
  return "formula" if not chip.runs_are_of else "calibrated" if chip.name in chip.runs_are_of else "sister"


def certainty_of_equality(ratio: float, tolerance: float) -> float:
  """Probability that two measured step times differ by at most a relative tolerance, given the predicted ratio."""
  error = statistics.NormalDist(math.log(ratio), RATIO_ERROR)
  return error.cdf(math.log(1 + tolerance)) - error.cdf(math.log(1 - tolerance) if tolerance < 1 else -math.inf)
