"""What numbers establish, and how it is said."""

from dataclasses import replace

import pytest

from moejax.comparison import judgement
from moejax.comparison.findings import finding, verdict
from moejax.comparison.record import (
  CANDIDATE,
  DENSE,
  ESTABLISHED,
  NO_DIFFERENCE,
  NOT_ESTABLISHED,
  VIOLATED,
  Against,
  Basis,
  MatchedPair,
)
from moejax.comparison.statistics import Estimate
from moejax.config import Upcycled

TOLERANCE = 0.05
INSIDE, ACROSS, OUTSIDE = (0.98, 1.04), (0.89, 1.18), (1.3, 1.45)
BETTER, WORSE, UNCLEAR, UNKNOWN = (-0.09, -0.05), (0.05, 0.09), (-0.02, 0.03), (None, None)


def candidate(
  bits=BETTER, times=INSIDE, whole: float | None = 1.01, at_equal_time=None, name: str = "m", dropped: float = 0.0
) -> Against:
  ratio = Estimate(sum(times) / 2, *times)
  at = bits if at_equal_time is None else at_equal_time
  found = Against(
    moe=name,
    step_time_ratio=ratio.value,
    step_time_ratio_interval=times,
    within_tolerance=abs(ratio.value - 1) <= TOLERANCE,
    whole_run_ratio=whole,
    equal_time=judgement.equal_time(ratio, whole, TOLERANCE),
    bits_per_byte_difference=-0.07 if bits is UNKNOWN else sum(bits) / 2,
    bits_per_byte_difference_interval=bits,
    bits_per_byte_detectable=None if bits is UNKNOWN else 0.035,
    bases=(
      Basis(
        equal="time",
        bits_per_byte_difference=sum(at) / 2 if None not in at else None,
        bits_per_byte_difference_interval=at,
        outcome=judgement.better(at),
      ),
    ),
  )
  found = replace(found, notes=judgement.notes(found, "d", TOLERANCE, dropped, rounds=48))
  return replace(found, outcome=judgement.outcome(found, TOLERANCE))


def pair(*candidates: Against, dense: str = "d") -> MatchedPair:
  outcome, best = judgement.pair_outcome(candidates, TOLERANCE)
  found = MatchedPair(**vars(candidates[0]) | {"outcome": outcome}, dense=dense, best=best, candidates=candidates)
  return replace(found, verdict=verdict(found, TOLERANCE))


@pytest.mark.parametrize(
  ("times", "whole", "found"),
  [
    (INSIDE, None, ESTABLISHED),
    (INSIDE, 1.05, ESTABLISHED),
    (INSIDE, 1.06, VIOLATED),
    (INSIDE, 0.94, VIOLATED),
    (ACROSS, None, NOT_ESTABLISHED),
    (ACROSS, 1.0, NOT_ESTABLISHED),
    (ACROSS, 1.2, VIOLATED),
    (OUTSIDE, None, VIOLATED),
    (OUTSIDE, 1.0, VIOLATED),
    ((float("nan"), float("nan")), 1.0, NOT_ESTABLISHED),
  ],
)
def test_equal_time_is_established_only_by_an_interval_and_whole_runs_within_the_tolerance(times, whole, found):
  assert judgement.equal_time(Estimate(1.0, *times), whole, TOLERANCE) == found


@pytest.mark.parametrize(
  ("of", "outcome"),
  [
    (candidate(BETTER), CANDIDATE),
    (candidate(WORSE), DENSE),
    (candidate(UNCLEAR), NO_DIFFERENCE),
    (candidate(UNKNOWN), NOT_ESTABLISHED),
    (candidate(BETTER, ACROSS), NOT_ESTABLISHED),
    (candidate(BETTER, OUTSIDE), NOT_ESTABLISHED),
    (candidate(WORSE, whole=1.2, at_equal_time=WORSE), DENSE),
    (candidate(BETTER, whole=1.2, at_equal_time=BETTER), CANDIDATE),
    (candidate(BETTER, whole=1.2, at_equal_time=UNCLEAR), NOT_ESTABLISHED),
    (candidate(BETTER, whole=1.2, at_equal_time=WORSE), NOT_ESTABLISHED),
    (candidate(BETTER, whole=1.2, at_equal_time=UNKNOWN), NOT_ESTABLISHED),
  ],
)
def test_better_is_said_only_where_time_and_quality_show_it(of, outcome):
  assert of.outcome == outcome


def test_the_verdict_and_the_finding_say_that_a_candidate_is_upcycled_and_whether_its_parent_counts():
  start = Upcycled(candidate="m", parent_fraction=0.5, count_parent=False).start
  for bits in (BETTER, WORSE, UNCLEAR):
    found = pair(replace(candidate(bits), start=start))
    for said in (found.verdict, finding([found])):
      assert "upcycled from the dense model after 50 % of the budget, which does not count" in said
  assert "upcycled" not in finding([pair(candidate(BETTER))])


@pytest.mark.parametrize(
  ("candidates", "outcome", "best"),
  [
    ([candidate(WORSE, name="a"), candidate(BETTER, name="b")], CANDIDATE, "b"),
    ([candidate(WORSE, name="a"), candidate(BETTER, OUTSIDE, name="b")], DENSE, "a"),
    ([candidate(WORSE, name="a"), candidate(UNCLEAR, name="b")], NO_DIFFERENCE, "b"),
    ([candidate(WORSE, name="a"), candidate(UNKNOWN, name="b")], NOT_ESTABLISHED, "b"),
    ([candidate(BETTER, ACROSS, name="a"), candidate(BETTER, OUTSIDE, name="b")], NOT_ESTABLISHED, None),
  ],
)
def test_the_outcome_of_a_pair_is_about_all_candidates_with_its_step_time(candidates, outcome, best):
  found = pair(*candidates)
  assert (found.moe, found.outcome, found.best) == ("a", outcome, best)


def test_a_verdict_states_the_size_and_its_interval():
  times = "the step time of m is 1.010 (0.980 to 1.040) times that of d, within 5 %"
  assert pair(candidate(BETTER)).verdict == (
    f"m is better than d at equal step time, by 0.070 (0.050 to 0.090) bits per byte; {times}"
  )
  assert pair(candidate(WORSE)).verdict == (
    f"d is better than m at equal step time, by 0.070 (0.050 to 0.090) bits per byte; {times}"
  )
  assert pair(candidate(UNCLEAR)).verdict == (
    "no difference found between d and m at equal step time: +0.005 (\N{MINUS SIGN}0.020 to +0.030) bits per byte; a "
    f"difference of 0.035 would have been found with a probability of 80 %; {times}"
  )
  two = pair(candidate(WORSE, name="a"), candidate((0.01, 0.03), name="b"))
  assert two.verdict.startswith(
    "d is better than b, the best candidate with its step time, at equal step time, by 0.020"
  )


@pytest.mark.parametrize(
  ("of", "reason"),
  [
    (
      candidate(BETTER, ACROSS),
      "1.035 (0.890 to 1.180) times that of d, so after 48 rounds it is not known whether it is equal",
    ),
    (candidate(BETTER, OUTSIDE), "1.375 (1.300 to 1.450) times that of d, which is not equal within 5 %"),
    (candidate(UNKNOWN), "the variation between seeds or documents is unknown"),
    (
      candidate(BETTER, whole=1.2, at_equal_time=UNCLEAR),
      "over the whole run, m trained 1.200 times as long as d; at equal time, the difference is "
      "+0.005 (\N{MINUS SIGN}0.020 to +0.030) bits per byte",
    ),
  ],
)
def test_a_verdict_that_is_not_established_says_why(of, reason):
  said = pair(of).verdict
  assert said.startswith("not established: ") and reason in said and "measured difference of m" in said


def test_a_match_that_drops_many_choices_says_so():
  assert "m drops" not in pair(candidate(BETTER, dropped=0.1)).verdict
  assert pair(candidate(BETTER, dropped=0.294)).verdict.endswith("; m drops 29.4 % of its choices of experts")


def test_a_verdict_before_training_says_only_what_was_measured():
  untrained = replace(candidate(BETTER), bits_per_byte_difference=None, bits_per_byte_difference_interval=None)
  assert pair(untrained).verdict == (
    "the step time of m is 1.010 (0.980 to 1.040) times that of d, within 5 %; not trained yet"
  )
  assert finding([pair(untrained), pair(candidate(BETTER))]) == "1 of 2 pairs are not trained yet."


def test_a_finding_sorts_the_scales_by_outcome():
  pairs = [
    pair(candidate(WORSE), dense="a"),
    pair(candidate(BETTER), dense="b"),
    pair(candidate(UNCLEAR), dense="c"),
    pair(candidate(BETTER, ACROSS), dense="e"),
  ]
  minus = "\N{MINUS SIGN}"
  assert finding(pairs) == (
    "At equal step time and equal training time, "
    f"the MoE is better at b ({minus}0.070 ({minus}0.090 to {minus}0.050) bits per byte with m); "
    "the dense model is better at a (+0.070 (+0.050 to +0.090) bits per byte with m); "
    f"no difference was found at c (+0.005 ({minus}0.020 to +0.030) bits per byte with m); "
    "nothing is established for e."
  )
  assert finding(pairs[3:]) == "At equal step time and equal training time, nothing is established for e."
