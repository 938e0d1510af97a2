"""Ratio estimates: a ratio of sums over documents, and its standard error."""

import numpy as np


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> float:
  """The ratio of the sums. Both arguments are by document."""
  return float(numerators.sum() / denominators.sum())


def ratio_stderr(numerators: np.ndarray, denominators: np.ndarray) -> float:
  """Standard error of the ratio, with documents as the sample (Cochran, Sampling Techniques, equation 2.46).

  The sample is documents instead of tokens because the tokens of a document are correlated, so that an error over
  tokens would be far too small. NaN if fewer than two documents have a nonzero denominator.
  """
  used = denominators > 0
  n = int(used.sum())
  if n < 2:
    return float("nan")
  residual = numerators[used] - ratio(numerators, denominators) * denominators[used]
  return float(np.sqrt(n / (n - 1) * np.square(residual).sum()) / denominators.sum())
