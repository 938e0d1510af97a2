"""Intervals of predicted step times, and the certainty that two are equal."""

import math
import random

import pytest

from moejax.config.chips import CHIPS
from moejax.planning.interval import certainty_of_equality, half_width, interval


def test_the_interval_of_other_runs_covers_four_fifths_of_them():
  """Split conformal prediction: whatever the distribution, a new error lies within the half-width at least so often."""
  draw = random.Random(0)
  covered = []
  for _ in range(2000):
    errors = [draw.gauss(0.1, 0.2) if draw.random() < 0.8 else draw.uniform(-1, 1) for _ in range(13)]
    covered.append(abs(errors[0]) <= half_width(errors[1:]))
  assert 0.79 < sum(covered) / len(covered) < 0.88


@pytest.mark.parametrize("errors", [[0.1], [0.1, -0.3], [-0.2, 0.1, 0.05]])
def test_few_errors_give_more_than_the_largest(errors):
  assert half_width(errors) > max(map(abs, errors))


def test_an_interval_holds_its_prediction_and_is_wider_the_less_a_chip_was_calibrated():
  def width(chip: str, formula: bool = False) -> float:
    low, high = interval(2.0, CHIPS[chip], sparse=True, formula=formula)
    assert low < 2.0 < high
    return high / low

  assert width("v5p") < width("tpu7x") < width("v5p", formula=True) == width("cpu")


def test_every_chip_says_whose_runs_calibrate_it():
  for chip in CHIPS.values():
    assert (chip.runs_are_of is None) == (chip.platform == "cpu"), chip.name
    assert chip.runs_are_of in (None, "other TPUs", *CHIPS), chip.name


def test_equality_is_less_certain_the_further_the_prediction_and_the_narrower_the_tolerance():
  near, far = certainty_of_equality(1.0, 0.05), certainty_of_equality(1.05, 0.05)
  assert 0 < far < near < certainty_of_equality(1.0, 0.1) < 1
  assert certainty_of_equality(1.0, 1.0) == pytest.approx(1.0, abs=1e-3)
  assert certainty_of_equality(math.e, 0.05) < 1e-6
  assert certainty_of_equality(1.0, 0.0) == 0
