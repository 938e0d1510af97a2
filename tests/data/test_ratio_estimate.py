"""Standard errors of ratios over documents."""

import numpy as np
import pytest

from moejax.data.ratio_estimate import ratio, ratio_stderr


def test_standard_error_of_equal_documents_is_that_of_their_mean():
  values = np.array([1.0, 2.0, 4.0, 7.0])
  assert ratio_stderr(values, np.ones(4)) == pytest.approx(values.std(ddof=1) / 2.0)


def test_standard_error_covers_the_spread_of_resampled_documents():
  random = np.random.default_rng(0)
  sizes = random.integers(10, 100, 200).astype(float)
  values = sizes * random.normal(2.0, 0.5, 200)
  samples = [random.integers(0, 200, 200) for _ in range(2000)]
  spread = np.std([values[s].sum() / sizes[s].sum() for s in samples])
  assert ratio_stderr(values, sizes) == pytest.approx(spread, rel=0.1)


def test_one_document_has_no_standard_error():
  assert np.isnan(ratio_stderr(np.array([1.0, 0.0]), np.array([2.0, 0.0])))


def test_the_standard_error_is_that_of_a_ratio_over_documents():
  values, sizes = np.array([3.0, 5.0, 0.0, 9.0]), np.array([1.0, 2.0, 0.0, 3.0])
  mean, stderr = ratio(values, sizes), ratio_stderr(values, sizes)
  assert mean == 17 / 6
  residual = [(3 - mean) ** 2, (5 - 2 * mean) ** 2, (9 - 3 * mean) ** 2]
  assert stderr == pytest.approx(np.sqrt(3 / 2 * sum(residual)) / 6)
