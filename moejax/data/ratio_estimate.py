"""A ratio of sums over documents, and how far it may be off."""

import numpy as np


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> float:
  """Sum over sum; both by document."""
  return float(numerators.sum() / denominators.sum())


def ratio_stderr(numerators: np.ndarray, denominators: np.ndarray) -> float:
  """Standard error of sum over sum, documents being the sample (Cochran, Sampling Techniques, equation 2.46).

  Documents and not tokens: tokens of a document are correlated, and an error over tokens would be far too small. Not a
  number where fewer than two documents have a denominator.
  """
  used = denominators > 0
  n = int(used.sum())
  if n < 2:
    return float("nan")
  residual = numerators[used] - ratio(numerators, denominators) * denominators[used]
  return float(np.sqrt(n / (n - 1) * np.square(residual).sum()) / denominators.sum())
