"""Intervals of step times and of differences in quality. Pure functions of NumPy arrays.

A step time is measured in rounds, in each of which all members take a turn, and a series holds one logarithm per round.
Rounds belong to sessions, which are minutes or hours apart.

There are J candidates.

X = runs with different seeds  Y = documents  Z = bootstrap samples
J other dimension
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

CONFIDENCE = 0.95
"""Confidence level of all intervals."""
POWER = 0.8
"""Probability with which the detectable difference is found."""
SAMPLES = 2000
"""Number of bootstrap samples."""


Ends = tuple[float | None, float | None]
"""Lower and upper end of an interval. An end is None if it is not finite."""


def ends(low: float, high: float) -> Ends:
  return (low if math.isfinite(low) else None), (high if math.isfinite(high) else None)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A value and its confidence interval."""

  value: float
  low: float
  high: float

  @property
  def interval(self) -> Ends:
    return ends(self.low, self.high)

  def is_within(self, low: float, high: float) -> bool:
    """Whether the whole interval is between these limits. False if the interval is unknown (NaN)."""
    return low <= self.low and self.high <= high

  def is_outside(self, low: float, high: float) -> bool:
    """Whether no part of the interval is between these limits. False if the interval is unknown (NaN)."""
    return self.high < low or self.low > high


def t_quantile(probability: float, degrees: float) -> float:
  """Quantile of Student's t distribution. Infinite if there are no degrees of freedom."""
  return float(special.stdtrit(degrees, probability)) if degrees > 0 else math.inf


def block_length(series: np.ndarray) -> int:
  """Length of the blocks of a circular block bootstrap, from the autocorrelation of successive values (Politis and
  White 2004, for a first-order autoregressive series)."""
  deviations = series - series.mean()
  total = float(np.square(deviations).sum())
  if len(series) < 4 or total == 0:
    return 1
  correlation = float((deviations[1:] * deviations[:-1]).sum()) / total
  correlation += (1 + 4 * max(correlation, 0.0)) / len(series)  # the bias of a short series (Kendall 1954)
  correlation = min(max(correlation, 0.0), 0.9)
  length = (1.5 * len(series)) ** (1 / 3) * (2 * correlation / (1 - correlation**2)) ** (2 / 3)
  return min(max(1, math.ceil(length * 1.3)), len(series) // 3)


def variance_of_mean(series: np.ndarray, length: int) -> float:
  """Variance of the mean of a series over all samples of a circular block bootstrap, in closed form, corrected for the
  number of blocks."""
  size = len(series)
  sums = np.cumsum(np.concatenate([[0.0], series, series[: length - 1]]))
  means = (sums[length:] - sums[:-length]) / length
  blocks = size / length
  return float(np.square(means - series.mean()).mean()) / max(blocks - 1, 1e-9)


def geometric_mean(sessions: Sequence[np.ndarray]) -> Estimate:
  """The geometric mean of values whose logarithms are given, with an interval by a block bootstrap over rounds.

  The mean differs between sessions if the machine changes. Sessions are therefore combined as in a random-effects
  meta-analysis (DerSimonian and Laird 1986). If they agree, each round has the same weight. If they differ by more than
  their rounds explain, each session has nearly the same weight, and the interval includes this variation.
  """
  first = max(sessions, key=len)
  length = block_length(first)
  rounds = sum(map(len, sessions))
  means = np.array([session.mean() for session in sessions])
  inner = rounds - len(sessions)
  if inner <= 0 or len(first) < 2:
    return Estimate(math.exp(float(means.mean())), math.nan, math.nan)
  pooled = sum(float(np.square(session - session.mean()).sum()) for session in sessions) / inner
  alone = float(np.square(first - first.mean()).sum()) / (len(first) - 1)
  # Successive rounds that resemble each other say less than independent ones. Only the longest session shows by how
  # much.
  inflation = variance_of_mean(first, length) * len(first) / alone if alone > 0 else 1.0
  variances = np.array([max(inflation, 1.0) * pooled / len(session) for session in sessions])
  if pooled == 0:
    variances = np.full(len(sessions), 1e-18)
  between = _between(means, variances)
  weights = 1 / (variances + between)
  mean = float((weights * means).sum() / weights.sum())
  degrees = len(sessions) - 1 if between > 0 else max(inner / length, 1.0)
  half = t_quantile((1 + CONFIDENCE) / 2, degrees) / math.sqrt(weights.sum())
  return Estimate(*(math.exp(x) for x in (mean, mean - half, mean + half)))


def _between(means: np.ndarray, variances: np.ndarray) -> float:
  """Variance between sessions beyond that of their means (DerSimonian and Laird 1986, equation 8)."""
  if len(means) < 2:
    return 0.0
  weights = 1 / variances
  excess = float((weights * np.square(means - (weights * means).sum() / weights.sum())).sum()) - (len(means) - 1)
  return max(0.0, excess / float(weights.sum() - np.square(weights).sum() / weights.sum()))


@dataclasses.dataclass(frozen=True)
class Scores:
  """The scores of one model: sums over the targets of each document, for each run."""

  numerators_XY: np.ndarray
  """Such as bits or correct targets."""
  denominators_Y: np.ndarray
  """Such as bytes or targets, which all models and runs have in common."""

  @property
  def by_seed(self) -> np.ndarray:
    """The ratio of the sums of each run."""
    return self.numerators_XY.sum(axis=1) / self.denominators_Y.sum()

  @property
  def value(self) -> float:
    return float(self.by_seed.mean())


@dataclasses.dataclass(frozen=True)
class SeedVariance:
  """Variance of the score of one run between seeds, pooled over the models that have several runs."""

  variance: float
  degrees: int
  """Degrees of freedom. 0 if no model has several runs, so that the variance is unknown."""


def seed_variance(models: Sequence[Scores]) -> SeedVariance:
  """Pools the variance between seeds over models."""
  several = [model.by_seed for model in models if len(model.by_seed) > 1]
  degrees = sum(len(values) - 1 for values in several)
  squares = sum(float(np.square(values - values.mean()).sum()) for values in several)
  return SeedVariance(squares / degrees if degrees else math.nan, degrees)


@dataclasses.dataclass(frozen=True)
class Difference:
  """The score of a candidate minus that of the dense model."""

  value: float
  stderr: float
  """Standard error over documents and seeds. NaN if the variation between seeds or documents is unknown."""
  low: float
  high: float
  """Interval at 95 % for all candidates of a pair together."""
  detectable: float
  """The difference that would have been found with a probability of 80 %."""
  documents_stderr: float
  """Standard error over documents alone."""

  @property
  def interval(self) -> Ends:
    return ends(self.low, self.high)


def differences(dense: Scores, candidates: Mapping[str, Scores], seeds: SeedVariance) -> dict[str, Difference]:
  """Compares candidates with a dense model, by a hierarchical bootstrap over documents and seeds.

  Each bootstrap sample draws documents, which are the same for all models (paired), and runs of each model. The
  intervals hold for all candidates together, so that the best of several can be picked: their width comes from the
  distribution of the largest standardized error of all candidates (max-t). Student's distribution accounts for few
  documents and few seeds, with the degrees of freedom of Welch and Satterthwaite. Documents of very different sizes
  count as fewer documents (Kish's effective sample size).
  """
  if not candidates:
    return {}
  names = list(candidates)
  weights_Y = dense.denominators_Y
  used = weights_Y > 0
  weights_Y = weights_Y[used]
  effective = float(np.square(weights_Y.sum()) / np.square(weights_Y).sum()) if used.any() else 0.0
  values_J = np.array([candidates[name].value - dense.value for name in names])
  dense_Y = dense.numerators_XY.mean(axis=0)
  gaps_JY = np.stack([(candidates[name].numerators_XY.mean(axis=0) - dense_Y)[used] for name in names])
  errors_ZJ = _document_errors(gaps_JY, weights_Y) * math.sqrt(effective / max(effective - 1, 1e-9))
  documents_J = errors_ZJ.std(axis=0)
  runs_J = np.array([seeds.variance * (1 / len(candidates[n].by_seed) + 1 / len(dense.by_seed)) for n in names])
  random = np.random.default_rng(1)
  dense_Z = random.normal(size=SAMPLES) * math.sqrt(seeds.variance / len(dense.by_seed))
  own_ZJ = random.normal(size=(SAMPLES, len(names))) * np.sqrt(
    [seeds.variance / len(candidates[n].by_seed) for n in names]
  )
  stderr_J = np.sqrt(np.square(documents_J) + runs_J)
  known = np.isfinite(stderr_J).all() and (stderr_J > 0).all() and effective > 1
  largest = 1.0
  if known and len(names) > 1:
    largest_Z = np.abs((errors_ZJ + own_ZJ - dense_Z[:, None]) / stderr_J).max(axis=1)
    normal = float(special.ndtri((1 + CONFIDENCE) / 2))
    largest = max(1.0, float(np.quantile(largest_Z, CONFIDENCE)) / normal)
  found = {}
  for i, name in enumerate(names):
    degrees = _degrees(float(documents_J[i]) ** 2, effective - 1, float(runs_J[i]), seeds.degrees)
    stderr = float(stderr_J[i]) if known else math.nan
    critical = t_quantile((1 + CONFIDENCE) / 2, degrees) * largest
    value, half = float(values_J[i]), critical * stderr
    detectable = (critical + t_quantile(POWER, degrees)) * stderr
    found[name] = Difference(value, stderr, value - half, value + half, detectable, float(documents_J[i]))
  return found


def _document_errors(gaps_JY: np.ndarray, weights_Y: np.ndarray) -> np.ndarray:
  """Errors [Z, C] of the ratio of sums over documents that are drawn with replacement."""
  size = len(weights_Y)
  if size < 2:
    return np.full((2, len(gaps_JY)), math.nan)
  random, ratios = np.random.default_rng(0), []
  for samples in np.array_split(np.arange(SAMPLES), math.ceil(SAMPLES * size / 1e7)):  # limits the memory
    counts_ZY = random.multinomial(size, np.full(size, 1 / size), size=len(samples)).astype(float)
    ratios.append((counts_ZY @ gaps_JY.T) / (counts_ZY @ weights_Y)[:, None])
  return np.concatenate(ratios) - gaps_JY.sum(axis=1) / weights_Y.sum()


def _degrees(documents: float, documents_degrees: float, runs: float, runs_degrees: float) -> float:
  """Degrees of freedom of a sum of two variances (Welch and Satterthwaite)."""
  parts = [(documents, documents_degrees), (runs, runs_degrees)]
  if any(degrees <= 0 for variance, degrees in parts if variance != 0) or documents + runs == 0:
    return 0.0
  return (documents + runs) ** 2 / sum(variance**2 / degrees for variance, degrees in parts if variance > 0)
