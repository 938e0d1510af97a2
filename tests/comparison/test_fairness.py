"""Comparisons at equal time, tokens and FLOPs, by curves whose values are known."""

import numpy as np
import pytest

from moejax.comparison.fairness import POINTS, Curve, curve, equal, relative_curve


def falling(end: float, speed: float = 1.0, bits: float = 0.0) -> Curve:
  """Bits per byte that fall by one for each factor of 10 in x, whose loss at x is that of `speed` x."""
  x_Z = POINTS * end
  return Curve(x_Z, 5 - np.log10(speed * x_Z) + bits)


def test_a_curve_that_is_twice_as_fast_has_a_factor_of_two_at_equal_loss():
  found = equal(falling(100.0), falling(100.0, speed=2.0), half_width=0.1)
  assert found.factor.value == pytest.approx(2.0, rel=0.01)
  assert found.factor.interval == pytest.approx((2 * 10**-0.1, 2 * 10**0.1), rel=0.01)
  assert found.at == 100.0 and found.difference == pytest.approx(-np.log10(2))


def test_the_longer_run_is_read_where_the_shorter_one_ends():
  found = equal(falling(100.0), falling(150.0), half_width=0.0)
  assert (found.at, found.difference) == (100.0, pytest.approx(0.0, abs=1e-3))
  assert found.factor.value == pytest.approx(1.0, abs=0.01)
  slower = equal(falling(100.0), falling(50.0, bits=0.2), half_width=0.0)
  assert slower.at == 50.0 and slower.difference == pytest.approx(0.2, abs=1e-3)
  assert slower.factor.value == pytest.approx(10**-0.2, rel=0.01)


def test_a_curve_is_the_mean_over_runs_and_ends_with_their_scores():
  steps_Z = np.arange(1.0, 101.0)
  relative = relative_curve(steps_Z, 5 - np.log(steps_Z))
  assert relative is not None and relative[-1] == 1.0
  found = curve([relative, relative], [2.0, 3.0], own=60.0)
  assert found.end == 60.0 and found.at(60.0) == 2.5
  assert found.at(30.0) == pytest.approx(2.5 * (5 - np.log(50)) / (5 - np.log(100)), rel=1e-3)
  assert relative_curve(steps_Z[:1], steps_Z[:1]) is None


def test_a_loss_that_was_never_reached_has_no_point():
  assert falling(100.0).first(2.0) == np.inf
  assert falling(100.0).first(4.0) == pytest.approx(10.0, rel=0.01)
  assert falling(100.0).first(9.0) == pytest.approx(0.1)
