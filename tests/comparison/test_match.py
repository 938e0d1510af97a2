"""Who is paired with whom, by step times made up for it."""

from dataclasses import replace

import pytest

from moejax.comparison.match import Match, approach, match
from moejax.config import Pair, Suite


@pytest.fixture
def four(tiny_dense, tiny_moe) -> Suite:
  """A dense model with three candidates, a to c; equal within a quarter."""
  candidates = tuple(replace(tiny_moe, name=name) for name in "abc")
  return Suite(name="four", pairs=(Pair(dense=tiny_dense, candidates=candidates),), tolerance=0.25)


def nearest(suite: Suite, a: float, b: float, c: float, dense: float = 1.0) -> Match:
  (found,) = match(suite, {"dense": dense, "a": a, "b": b, "c": c})
  return found


@pytest.mark.parametrize(
  ("times", "name"),
  [
    ((0.5, 1.125, 4.0), "b"),
    ((0.75, 0.5, 0.25), "a"),  # all faster
    ((4.0, 3.0, 2.0), "c"),  # all slower
    ((0.5, 1.75, 3.0), "b"),  # twice as fast is farther than 1.75 times as slow, though 0.5 is nearer to 1 than 1.75
    ((0.5, 2.5, 3.0), "a"),
    ((1.0, 1.0, 1.0), "a"),  # of equals the first
  ],
)
def test_the_nearest_is_nearest_by_factor(four, times, name):
  assert nearest(four, *times).moe == name


@pytest.mark.parametrize(("a", "b"), [(0.8, 1.25), (1.25, 0.8)])
def test_four_fifths_and_five_quarters_are_equally_far_so_the_first_is_taken(four, a, b):
  assert nearest(four, a, b, 9.0).moe == "a"


@pytest.mark.parametrize("unit", [1.0, 2.0**-10, 2.0**10])
def test_only_ratios_matter(four, unit):
  found = nearest(four, 0.5 * unit, 1.125 * unit, 4.0 * unit, dense=unit)
  assert found == Match(dense="dense", moe="b", step_time_ratio=1.125, within_tolerance=True)


@pytest.mark.parametrize(
  ("time", "within"),
  [(1.0, True), (1.25, True), (1.2500001, False), (0.75, True), (0.7499999, False)],
)
def test_a_difference_of_exactly_the_tolerance_counts_as_equal(four, time, within):
  found = nearest(four, time, 9.0, 9.0)
  assert (found.moe, found.step_time_ratio, found.within_tolerance) == ("a", time, within)


def test_the_nearest_is_named_even_where_it_is_not_near(four):
  assert nearest(four, 4.0, 3.0, 5.0) == Match("dense", "b", 3.0, within_tolerance=False)


def test_each_pair_is_matched_on_its_own(tiny_dense, tiny_moe):
  def pair(prefix: str) -> Pair:
    candidates = tuple(replace(tiny_moe, name=f"{prefix}_{name}") for name in "ab")
    return Pair(dense=replace(tiny_dense, name=prefix), candidates=candidates)

  suite = Suite(name="two", pairs=(pair("small"), pair("large")))
  times = {"small": 1.0, "small_a": 1.5, "small_b": 1.0, "large": 2.0, "large_a": 2.0, "large_b": 1.0}
  assert match(suite, times) == [Match("small", "small_b", 1.0, True), Match("large", "large_a", 1.0, True)]


@pytest.mark.parametrize(("target_s", "value"), [(1.0, 1), (8.0, 8), (5.2, 5), (0.1, 1), (100.0, 16), (6.5, 7)])
def test_approach_finds_the_nearest_of_a_ladder_and_asks_the_clock_a_few_times(target_s, value):
  asked: list[int] = []

  def clock(x: int) -> float:
    asked.append(x)
    return float(x)

  found = approach(target_s, range(1, 17), clock, tolerance=0.001)
  assert found == (value, float(value))
  assert len(asked) == len(set(asked)) <= 5


def test_approach_stops_at_the_first_value_within_tolerance():
  asked: list[int] = []

  def clock(x: int) -> float:
    asked.append(x)
    return float(x)

  assert approach(8.3, range(1, 17), clock, tolerance=0.05) == (8, 8.0)
  assert asked == [8]


@pytest.mark.parametrize(("target_s", "asked"), [(13.5, [16, 8, 14]), (3.1, [2, 9, 3])])
def test_approach_begins_where_it_is_told_and_goes_from_there_to_the_side_of_the_target(target_s, asked):
  found: list[int] = []

  def clock(x: int) -> float:
    found.append(x)
    return float(x)

  approach(target_s, range(1, 17), clock, tolerance=0.05, first=asked[0] - 1)
  assert found == asked


def test_approach_keeps_below_what_does_not_run():
  assert approach(12.0, range(1, 17), lambda x: float(x) if x <= 9 else None, tolerance=0.01) == (9, 9.0)
  assert approach(12.0, range(1, 17), lambda x: None, tolerance=0.01) is None
