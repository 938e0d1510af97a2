"""Intervals of predicted step times, and the certainty that two are equal."""

import math

import pytest

from moejax.config.chips import CHIPS
from moejax.planning.interval import certainty_of_equality, interval


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
