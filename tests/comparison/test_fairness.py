"""Comparisons at equal time, tokens and FLOPs, by curves whose values are known."""

import numpy as np
import pytest

from moejax.comparison.fairness import POINTS, Curve, curve, equal, relative_curve


def falling(end: float, speed: float = 1.0, bits: float = 0.0) -> Curve:
  """Bits per byte that fall by one for each factor of 10 in x, whose loss at x is that of `speed` x."""
  x_Z = POINTS * end
  bits_Z = 5 - np.log10(speed * x_Z) + bits
  return Curve(x_Z, bits_Z, bits_Z)


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


def law(fraction: float) -> float:
  """The score of a finished run of this length."""
  return 2.0 * fraction**-0.1


def unfinished(penalty: float) -> np.ndarray:
  """The losses of a run whose learning rate decays in its last fifth, which lowers them by `penalty`."""
  steps_Z = np.arange(1.0, 1001.0)
  high_Z = penalty * np.clip((1.0 - steps_Z / 1000) / 0.2, 0.0, 1.0)
  relative = relative_curve(steps_Z, law(steps_Z / 1000) * (1.0 + high_Z))
  assert relative is not None
  return relative


@pytest.mark.parametrize("longer", [1.0, 1.1, 1.3, 1.8])
@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_a_run_that_is_read_before_its_decay_is_not_called_worse_for_that(longer, gain):
  """The dense run takes `longer`, and at the same length the finished candidate would be better by `gain`."""
  relative, end = unfinished(0.05), law(1.0)
  candidate = curve([relative], [law(1.0 / longer) - gain], own=1.0 / longer)
  alone = equal(curve([relative], [end], own=1.0), candidate, half_width=0.01)
  low, high = alone.interval
  assert low < -gain < high
  assert alone.difference == pytest.approx(-gain, abs=1e-6) if longer == 1.0 else alone.difference < -gain - 0.03
  with_shorter = equal(curve([relative], [end], 1.0, shorter={0.5: law(0.5)}), candidate, half_width=0.01)
  assert with_shorter.difference == pytest.approx(-gain, abs=1e-3)
  assert with_shorter.interval == pytest.approx((-gain - 0.01, -gain + 0.01), abs=1e-3)


@pytest.mark.parametrize("rises", ["dense", "candidate"])
def test_where_training_losses_rise_the_interval_still_contains_the_difference(rises):
  """As by noise, or as a run diverges."""
  steps_Z = np.arange(1.0, 1001.0)
  relative = relative_curve(steps_Z, np.where(steps_Z < 900, 2.0, 2.2))
  assert relative is not None
  longer, shorter = curve([relative], [2.2], own=1.0), curve([np.ones_like(POINTS)], [2.0], own=0.8)
  dense, candidate = (longer, shorter) if rises == "dense" else (shorter, longer)
  found = equal(dense, candidate, half_width=0.01)
  assert found.difference == pytest.approx(0.0, abs=1e-3) and found.interval == pytest.approx((-0.01, 0.01), abs=1e-3)


@pytest.mark.parametrize("diverged", ["dense", "candidate"])
def test_a_shorter_run_that_diverged_gives_no_number(diverged):
  longer, shorter = curve([unfinished(0.05)], [law(1.0)], 1.0, shorter={0.5: np.nan}), falling(0.8)
  found = equal(*((longer, shorter) if diverged == "dense" else (shorter, longer)), half_width=0.01)
  assert np.isnan([found.difference, *found.interval]).all() and found.factor.interval == (None, None)
  assert np.isnan(found.factor.value)


def test_before_the_shortest_finished_run_a_curve_has_the_shape_of_the_losses():
  relative = unfinished(0.05)
  found = curve([relative], [law(1.0)], own=100.0, shorter={0.5: law(0.5)})
  assert found.at(50.0) == pytest.approx(law(0.5), rel=1e-3) and found.at(80.0) == pytest.approx(law(0.8), rel=1e-3)
  assert found.at(10.0) / found.at(49.0) == pytest.approx(law(0.1) / law(0.49), rel=1e-2)
  assert found.best(10.0) == pytest.approx(law(0.5)) and found.best(70.0) == found.at(70.0)


def test_a_loss_that_was_never_reached_has_no_point():
  assert falling(100.0).first(2.0) == np.inf
  assert falling(100.0).first(4.0) == pytest.approx(10.0, rel=0.01)
  assert falling(100.0).first(9.0) == pytest.approx(0.1)
