"""Intervals of predicted step times, and the certainty that two are equal."""

import dataclasses
import importlib.util
import math
import pathlib
import random
import sys
from typing import Any

import pytest

from moejax.config.chips import CHIPS
from moejax.planning.calibrated_chip import Calibration, with_calibration
from moejax.planning.interval import HALF_WIDTH, RATIO_ERROR, basis, certainty_of_equality, half_width, interval

DOCS = pathlib.Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def half_widths() -> Any:
  return _script("half_widths")


def _script(name: str) -> Any:
  spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module  # its dataclasses look themselves up
  spec.loader.exec_module(module)
  return module


def test_runs_that_are_not_planned_again_keep_what_the_page_says_of_them():
  step_time = _script("step_time")
  page = (DOCS / "step-time.md").read_text()
  assert step_time.page_of({}, page) == page
  changed = page.replace("| 1.535 |", "| 1.635 |")  # not what the file has, so that the line is of another run
  with pytest.raises(SystemExit, match=r"no line that starts with .*gpu:h100:8 .*without --only"):
    step_time.page_of({}, changed)


def test_the_constants_are_those_that_the_command_computes_from_the_pages(half_widths):
  widths, ratio = half_widths.constants()
  assert widths == HALF_WIDTH and ratio == RATIO_ERROR


def test_every_run_of_the_page_is_read_and_is_predicted_without_its_own_time(half_widths):
  page = (DOCS / "step-time.md").read_text()
  found = half_widths.runs(page)
  assert len(found) == page.count("\n- ", page.index("## Sources"))
  assert {run.framework for run in found} == {"axlearn", "MaxText", "tpu-recipes"}
  alone = [run for run in found if run.efficiency is not None and run.chip == "v5p"]
  one, other = (math.log(run.efficiency) for run in alone)
  assert half_widths.calibrated_errors(alone) == pytest.approx([one - other, other - one])
  # What a run took does not change its own error alone: with another efficiency it is that much further off.
  faster = [dataclasses.replace(alone[0], efficiency=2 * alone[0].efficiency), alone[1]]
  assert half_widths.calibrated_errors(faster)[0] == pytest.approx(one - other + math.log(2))


def test_an_interval_holds_its_prediction_and_is_no_narrower_for_a_chip_without_runs():
  def width(chip: str, formula: bool = False) -> float:
    low, high = interval(2.0, CHIPS[chip], sparse=True, formula=formula)
    assert low < 2.0 < high
    return high / low

  wide = interval(2.0, CHIPS["cpu"], sparse=True, formula=True)
  narrow = interval(2.0, CHIPS["cpu"], sparse=False, formula=True)
  assert wide[0] < narrow[0] < narrow[1] < wide[1]  # fewer runs of MoE models are published
  assert width("v5p") <= width("tpu7x") and width("v5p", formula=True) == width("cpu")


def test_every_chip_says_whose_runs_calibrate_it():
  for chip in CHIPS.values():
    assert bool(chip.runs_are_of) == (chip.platform != "cpu"), chip.name
    for name in chip.runs_are_of:  # a chip with runs, so that its own are among those that calibrate it
      assert CHIPS[name].platform == chip.platform and name in CHIPS[name].runs_are_of, chip.name


def test_what_a_prediction_rests_on():
  measured = Calibration(matrix=0.9, kernel=0.9, memory=0.9)
  for chip, runs, expected in (
    ("v5p", None, "calibrated"),
    ("tpu7x", None, "sister"),
    ("h200", None, "calibrated"),
    ("b200", None, "sister"),
    ("cpu", None, "formula"),
    ("v5p", 0, "sister"),
    ("cpu", 0, "sister"),
    ("cpu", 1, "calibrated"),
  ):
    known = CHIPS[chip]
    if runs is not None:
      known = with_calibration(known, dataclasses.replace(measured, runs=runs))
    assert (basis(known, formula=False), basis(known, formula=True)) == (expected, "formula"), (chip, runs)


def test_equality_is_less_certain_the_further_the_prediction_and_the_narrower_the_tolerance():
  near, far = certainty_of_equality(1.0, 0.05), certainty_of_equality(1.05, 0.05)
  assert 0 < far < near < certainty_of_equality(1.0, 0.1) < 1
  assert certainty_of_equality(1.0, 1.0) == pytest.approx(1.0, abs=1e-3)
  assert certainty_of_equality(math.e, 0.05) < 1e-6
  assert certainty_of_equality(1.0, 0.0) == 0
  # From 1 - tolerance to 1 + tolerance, whose logarithms are not opposite.
  middle = math.sqrt(0.9 * 1.1)
  assert certainty_of_equality(middle * 1.2, 0.1) == pytest.approx(certainty_of_equality(middle / 1.2, 0.1))


def test_the_half_width_of_other_runs_covers_four_fifths():
  """Split conformal prediction: whatever the distribution, a new error lies within the half-width at least so often."""
  draw = random.Random(0)
  covered = []
  for _ in range(2000):
    errors = [draw.gauss(0.1, 0.2) if draw.random() < 0.8 else draw.uniform(-1, 1) for _ in range(13)]
    covered.append(abs(errors[0]) <= half_width(errors[1:]))
  assert 0.79 < sum(covered) / len(covered) < 0.88
  assert half_width([0.1, -0.3]) > 0.3
  assert half_width([-0.1 * n for n in range(1, 10)]) == pytest.approx(0.8)
