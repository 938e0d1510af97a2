"""What is said about numbers, and what is not."""

import pytest

from moejax.comparison.findings import finding, verdict
from moejax.comparison.match import Match
from moejax.comparison.record import MatchedPair
from moejax.evaluation.held_out import Difference

NEAR = Match(dense="d", moe="m", step_time_ratio=1.02, within_tolerance=True)
FAR = Match(dense="d", moe="m", step_time_ratio=1.5, within_tolerance=False)


def of(bits: float, stderr: float) -> Difference:
  return Difference(
    bits_per_byte_difference=bits,
    bits_per_byte_difference_stderr=stderr,
    accuracy_difference=0.5,
    accuracy_difference_stderr=0.1,
  )


@pytest.mark.parametrize(
  ("bits", "stderr", "said"),
  [
    (-0.05, 0.01, "in the same training time m is better than d by 0.050 ± 0.010 bits per byte"),
    (0.05, 0.01, "in the same training time d is better than m by 0.050 ± 0.010 bits per byte"),
    (-0.015, 0.01, "no significant difference (-0.015 ± 0.010 bits per byte)"),
    (0.015, 0.01, "no significant difference (+0.015 ± 0.010 bits per byte)"),
    (0.0, 0.0, "no significant difference (+0.000 ± 0.000 bits per byte)"),
  ],
  ids=["better", "worse", "noise below 0", "noise above 0", "the same"],
)
def test_a_verdict_names_the_better_one_only_beyond_noise(bits, stderr, said):
  assert verdict(NEAR, of(bits, stderr), 0.05) == f"m matches d at 1.02 times its step time; {said}"


@pytest.mark.parametrize(("bits", "better"), [(0.5, False), (0.5000001, True), (-0.5, False), (-0.5000001, True)])
def test_noise_ends_above_two_standard_errors(bits, better):
  assert ("is better than" in verdict(NEAR, of(bits, 0.25), 0.05)) == better


def test_an_unknown_error_supports_no_difference():
  unknown = of(-0.5, float("nan"))
  assert verdict(NEAR, unknown, 0.05).endswith("no significant difference (-0.500 ± nan bits per byte)")
  assert "there is no significant difference at d" in finding([pair("d", -0.5, float("nan"))])


def test_a_verdict_on_a_pair_that_does_not_match_says_so_first():
  assert verdict(FAR, of(-0.05, 0.01), 0.05) == (
    "no candidate matches d within 5%: the closest is m at 1.50 times its step time; "
    "in the same training time m is better than d by 0.050 ± 0.010 bits per byte"
  )


def test_a_verdict_before_training_says_only_what_was_measured():
  assert verdict(NEAR, None, 0.05) == "m matches d at 1.02 times its step time; not trained yet"
  assert verdict(FAR, None, 0.1) == (
    "no candidate matches d within 10%: the closest is m at 1.50 times its step time; not trained yet"
  )


def pair(dense: str, bits: float | None, stderr: float | None = 0.01, within: bool = True) -> MatchedPair:
  return MatchedPair(
    dense=dense,
    moe="m",
    within_tolerance=within,
    bits_per_byte_difference=bits,
    bits_per_byte_difference_stderr=stderr,
  )


@pytest.mark.parametrize(
  ("pairs", "said"),
  [
    ([pair("a", -0.05)], "the MoE is better at a (-0.050 ± 0.010 bits per byte)."),
    ([pair("a", 0.05)], "the dense model is better at a (+0.050 ± 0.010 bits per byte)."),
    ([pair("a", 0.01)], "there is no significant difference at a (+0.010 ± 0.010 bits per byte)."),
    (
      [pair("a", -0.05), pair("b", -0.1)],
      "the MoE is better at a (-0.050 ± 0.010 bits per byte), b (-0.100 ± 0.010 bits per byte).",
    ),
    (
      [pair("a", 0.01), pair("b", 0.05), pair("c", -0.05)],
      "the MoE is better at c (-0.050 ± 0.010 bits per byte), and the dense model is better at b (+0.050 ± 0.010 bits "
      "per byte), and there is no significant difference at a (+0.010 ± 0.010 bits per byte).",
    ),
    (
      [pair("a", -0.05), pair("b", -0.9, within=False), pair("c", 0.9, within=False)],
      "the MoE is better at a (-0.050 ± 0.010 bits per byte); no candidate matches the step time of b, c.",
    ),
  ],
  ids=["better", "worse", "noise", "better twice", "all three", "with pairs that do not match"],
)
def test_a_finding_sorts_the_scales_that_match(pairs, said):
  assert finding(pairs) == f"At equal step time and equal training time, {said}"


def test_a_finding_claims_nothing_where_nothing_matches():
  assert finding([pair("a", -0.9, within=False)]) == (
    "No MoE candidate matches the step time of a dense model within the tolerance, so no pair can be compared."
  )


def test_a_finding_claims_nothing_before_all_pairs_are_trained():
  pairs = [pair("a", -0.05), pair("b", None, None), pair("c", None, None)]
  assert finding(pairs) == "2 of 3 pairs are not trained yet."
