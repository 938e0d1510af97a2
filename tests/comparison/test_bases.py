"""The comparison at equal active parameters and tokens, where active parameters differ."""

import dataclasses
import math

import numpy as np
import pytest

from moejax.comparison import fairness
from moejax.comparison.against import bits
from moejax.comparison.bases import Runs, bases
from moejax.comparison.record import NOT_COMPARABLE, Member
from moejax.comparison.stages import Result
from moejax.comparison.statistics import differences, seed_variance
from moejax.evaluation.held_out import NATS_PER_BIT, HeldOut

TOKENS = 1e6
STEPS_Z = np.linspace(1, 1000, 500)


def loss(active: float, tokens):
  """Linear in the logarithm of active parameters, so that interpolation is exact."""
  return 5.0 - 0.2 * math.log(active) + 0.5 * (tokens / TOKENS) ** -0.3


def runs(sizes: dict[str, float], gain: float, tolerance=0.05, shorter=True) -> Runs:
  """Two seeds of each member; the candidate, "moe", is better by `gain` than a dense model of its size. Of half of the
  budget, there are finished runs if `shorter`."""
  random, members, results, halves = np.random.default_rng(0), {}, {}, {}
  ones = np.ones(200)

  def held_out(bits: float) -> HeldOut:
    return HeldOut((bits + 1e-3 * random.standard_normal(200)) * NATS_PER_BIT, ones, ones, ones)

  for name, active in sizes.items():
    of_moe = gain if name == "moe" else 0.0
    tokens = TOKENS * (2.0 if name == "large" else 1.0)
    curve_Z = loss(active, tokens * STEPS_Z / 1000) - of_moe
    members[name] = Member(
      name=name, kind="moe" if name == "moe" else "dense", pair="dense", matched=True, parameters_active=active,
      tokens=tokens, train_time_s=1.0, model_flops_per_token=6 * active,
    )  # fmt: skip
    relative_Z = fairness.relative_curve(STEPS_Z, curve_Z)
    results[name] = [Result({"seed": seed}, held_out(curve_Z[-1]), relative_Z) for seed in range(2)]
    halves[name] = [Result({"seed": seed}, held_out(loss(active, tokens / 2) - of_moe)) for seed in range(2)]
  seeds = seed_variance([bits(each) for each in results.values()])
  return Runs(members, results, bits, seeds, tolerance, {0.5: halves} if shorter else {})


def at_equal_tokens(found: Runs):
  difference = differences(bits(found.results["dense"]), {"moe": bits(found.results["moe"])}, found.seeds)["moe"]
  by = {basis.equal: basis for basis in bases(found, "dense", "moe", difference)}
  assert set(by) == {"time", "tokens", "flops"} and by["time"].note is None
  return by["tokens"], difference


@pytest.mark.parametrize("gain", [-0.05, 0.0, 0.05])
@pytest.mark.parametrize("active", [1.2e6, 2e6, 3.5e6])
def test_a_larger_candidate_is_compared_with_a_dense_model_of_its_size(gain, active):
  """By its size alone, it is better than the dense model of its pair, at any gain."""
  found, whole = at_equal_tokens(runs({"dense": 1e6, "moe": active, "large": 4e6, "huge": 1e9}, gain))
  low, high = found.bits_per_byte_difference_interval
  assert found.bits_per_byte_difference == pytest.approx(-gain, abs=2e-3) and low < -gain < high
  assert high - low > whole.high - whole.low
  expected = {-0.05: "dense better", 0.0: "no difference found", 0.05: "candidate better"}
  assert found.outcome == expected[gain]
  assert "interpolated between dense (1.00M) and large (4.00M)" in found.note


def test_a_dense_model_that_is_longer_and_has_no_finished_run_of_this_length_is_not_called_worse():
  """The larger dense model has twice the tokens."""
  sizes = {"dense": 1e6, "moe": 3.5e6, "large": 4e6}
  assert at_equal_tokens(runs(sizes, 0.05))[0].outcome == "candidate better"
  found, _ = at_equal_tokens(runs(sizes, 0.05, shorter=False))
  assert found.outcome == "no difference found" and found.bits_per_byte_difference == pytest.approx(-0.05, abs=2e-3)


def test_a_shorter_budget_counts_once_it_is_finished_with_all_seeds_of_the_whole_one():
  sizes = {"dense": 1e6, "moe": 3.5e6, "large": 4e6}
  whole = runs(sizes, 0.05)
  (halves,) = whole.shorter.values()
  first_seed, none = (
    dataclasses.replace(whole, shorter={0.5: {**halves, "large": halves["large"][:seeds]}}) for seeds in (1, 0)
  )
  assert at_equal_tokens(first_seed) == at_equal_tokens(none) != at_equal_tokens(whole)


def test_without_a_dense_member_beyond_it_a_candidate_of_another_size_is_not_compared():
  for sizes in (
    {"dense": 1e6, "moe": 2e6},
    {"dense": 1e6, "moe": 2e6, "small": 5e5},
    {"dense": 1e6, "moe": 5e5, "large": 4e6},
  ):
    found, _ = at_equal_tokens(runs(sizes, 0.0))
    assert found.outcome == NOT_COMPARABLE and found.bits_per_byte_difference is None and found.factor is None
    assert "1.00M" in found.note and "active parameters" in found.note
  other_text = runs({"dense": 1e6, "moe": 2e6, "large": 4e6}, 0.0)
  for result in other_text.results["large"]:
    held_out = dataclasses.replace(result.held_out, targets=result.held_out.targets + 1)
    object.__setattr__(result, "held_out", held_out)
  assert at_equal_tokens(other_text)[0].outcome == NOT_COMPARABLE


def test_within_the_tolerance_a_candidate_is_compared_with_its_own_dense_model():
  found, whole = at_equal_tokens(runs({"dense": 1e6, "moe": 1.04e6}, 0.0))
  assert found.note is None and found.bits_per_byte_difference == pytest.approx(whole.value, abs=1e-3)
