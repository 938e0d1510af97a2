"""The numbers of comparison.json, by hand."""

from dataclasses import replace

import numpy as np
import pytest
from counting import Filled

from moejax.comparison.budget import allot
from moejax.comparison.match import match
from moejax.comparison.measurements import Measurements, Program, Session, Turn
from moejax.comparison.outcome import outcome
from moejax.comparison.record import Baselines
from moejax.comparison.stages import Result
from moejax.config.parameters import flops_per_token, parameter_counts
from moejax.evaluation.held_out import HeldOut

STEP_TIMES_S = {"dense": 0.5, "sparse": 0.75, "wide": 0.25}
OF_ROUTER = {"choices_per_token": 1.5, "dropped_fraction": 0.25, "load_max_over_mean": 3.0}
PROGRAMS = {name: Program(compile_time_s=3.0, peak_flops=1e9) for name in STEP_TIMES_S}
TURNS = {
  name: [Turn(tuple(seconds * part for part in (0.9375, 1.0, 1.0, 1.0625)), **(OF_ROUTER if name == "sparse" else {}))]
  * 3
  for name, seconds in STEP_TIMES_S.items()
}
SUMMARY = {
  "held_out/bits_per_byte": 2.5,
  "held_out/bits_per_byte_stderr": 0.0625,
  "held_out/accuracy": 0.375,
  "held_out/accuracy_stderr": 0.03125,
  "tasks/sciq/acc": 0.25,
  "train_time_s": 60.0,
  "goodput": {"fraction": 0.75, "save_s": 5.0},
  "loss": 3.0,
}
TARGETS = np.array([4.0, 4.0])


def outcome_of(suite, trained=(), held_out=None, programs=PROGRAMS, fill=1.0):
  """The outcome once the members in `trained` have a result."""
  measurements = Measurements(programs, (Session("before training", 1e9, TURNS),))
  matches = match(suite, STEP_TIMES_S)
  allotments = allot(suite, matches, STEP_TIMES_S, Filled(fill))
  tokens = {allotment.name: allotment.tokens for allotment in allotments}
  held_out = held_out or {}
  results = {
    name: [Result(SUMMARY | {"tokens": tokens[name]}, scored) for scored in held_out.get(name, [scores([4.0, 6.0])])]
    for name in trained
  }
  return outcome(suite, measurements, matches, allotments, results, {}, {}, Baselines(), {})


def scores(bits) -> HeldOut:
  return HeldOut(np.log(2.0) * np.array(bits), TARGETS / 4, TARGETS, TARGETS)


@pytest.mark.parametrize(
  ("train", "trained", "complete"),
  [
    ("all", ("dense", "sparse", "wide"), True),
    ("all", ("dense", "sparse"), False),
    ("all", (), False),
    ("matched", ("dense", "sparse"), True),  # "sparse" is the nearest
    ("matched", ("dense",), False),
  ],
)
def test_a_comparison_is_complete_when_all_members_that_the_suite_trains_have_a_summary(
  tiny_suite, train, trained, complete
):
  assert outcome_of(replace(tiny_suite, train=train), trained).complete is complete


def test_a_member_has_its_rates_its_budget_and_its_scores(tiny_suite):
  (pair,) = tiny_suite.pairs
  dense, sparse, wide = outcome_of(tiny_suite, ("dense", "sparse")).members
  for member, experiment in ((dense, pair.dense), (sparse, pair.candidates[0]), (wide, pair.candidates[1])):
    seconds, flops = STEP_TIMES_S[experiment.name], flops_per_token(experiment.model, 32)
    assert member.name == experiment.name and member.pair == "dense"
    assert member.model_flops_per_token == flops
    assert member.tokens_per_step == 8 * 32
    assert member.tokens_per_s == pytest.approx(256 / seconds)
    if member is not sparse:
      assert member.mfu == pytest.approx(256 / seconds * flops / 1e9)
    assert (member.step_time_s, member.compile_time_s) == (pytest.approx(seconds), 3.0)
    assert member.step_time_spread == pytest.approx(0.0625, rel=0.5)
    assert member.step_time_interval_s == pytest.approx((seconds, seconds), rel=1e-6)
    assert member.parameters_total == parameter_counts(experiment.model).total
    assert member.parameters_active == parameter_counts(experiment.model).active
    assert member.tokens == member.steps * 256
  for member in (dense, sparse):
    assert member.goodput == {"goodput/fraction": 0.75, "goodput/save_s": 5.0}
    assert member.bits_per_byte == pytest.approx(10 / 8) and member.bits_per_byte_stderr == pytest.approx(2 / 8)
    assert (member.accuracy, member.accuracy_stderr) == (0.25, 0.0)
    assert member.runs == (member.name,) and member.bits_per_byte_by_run == pytest.approx((10 / 8,))
    assert (member.train_time_s, member.tasks["tasks/sciq/acc"]) == (60.0, 0.25)
    assert "loss" not in member.to_json()
  assert wide.bits_per_byte is None and wide.train_time_s is None
  assert [member.matched for member in (dense, sparse, wide)] == [True, True, False]
  assert [member.kind for member in (dense, sparse, wide)] == ["dense", "moe", "moe"]
  assert (dense.num_experts, dense.dispatch, dense.capacity_factor) == (0, None, None)
  assert (wide.router, wide.dispatch, wide.feed_forward, wide.optimizer) == ("top_k", "einsum", "mlp", "AdamW")
  assert (wide.num_experts, wide.experts_per_token, wide.sparse_every) == (4, 2, 2)


def test_flops_count_more_than_six_times_the_active_parameters(tiny_suite):
  """Attention scores have FLOPs and no parameters; the embedding has parameters and no FLOPs."""
  for member in outcome_of(tiny_suite).members:
    assert member.model_flops_per_token != pytest.approx(6 * member.parameters_active, rel=0.01)


def test_padding_is_no_token_and_a_dropped_choice_no_work(tiny_suite):
  dense, member, _ = outcome_of(tiny_suite, fill=0.5).members
  assert dense.tokens_per_step == 128 and dense.tokens == dense.steps * 128 >= 20 * 8144
  assert dense.mfu == pytest.approx(128 / 0.5 * dense.model_flops_per_token / 1e9)
  expert = 6 * 3 * 16 * 8  # in one of two layers, half a choice less than 2
  assert member.mfu == pytest.approx(128 / 0.75 * (member.model_flops_per_token - expert / 2) / 1e9)
  assert (dense.dropped_fraction, member.dropped_fraction) == (None, 0.25)
  assert (dense.load_max_over_mean, member.load_max_over_mean) == (None, 3.0)


def test_without_a_known_peak_there_is_no_utilization(tiny_suite):
  found = outcome_of(tiny_suite, programs={name: Program(3.0, None) for name in PROGRAMS})
  assert [member.mfu for member in found.members] == [None] * 3


def test_a_difference_is_that_of_the_moe_minus_the_dense_model(tiny_suite):
  held_out = {"dense": [scores([8.0, 16.0])], "sparse": [scores([7.0, 13.0])]}
  (pair,) = outcome_of(tiny_suite, ("dense", "sparse"), held_out).pairs
  assert (pair.dense, pair.moe, pair.within_tolerance, pair.equal_time) == ("dense", "sparse", False, "violated")
  assert pair.step_time_ratio == pytest.approx(1.5) and pair.whole_run_ratio == 1.0
  assert pair.bits_per_byte_difference == pytest.approx(-4 / 8)
  assert pair.accuracy_difference == 0.0
  # One run of each member says nothing about the variation between seeds.
  assert pair.bits_per_byte_difference_interval == (None, None) and pair.outcome == "not established"
  assert [(each.moe, each.bits_per_byte_difference) for each in pair.candidates] == [
    ("sparse", pair.bits_per_byte_difference), ("wide", None),
  ]  # fmt: skip
  assert (pair.documents, pair.documents_effective) == (2, pytest.approx(2.0))
  assert outcome_of(tiny_suite).finding == "1 of 1 pairs are not trained yet."


def test_results_are_means_over_runs_and_seeds_widen_the_errors(tiny_suite):
  (pair,) = tiny_suite.pairs
  suite = replace(tiny_suite, pairs=(replace(pair, seeds=2),))
  held_out = {"dense": [scores([8.0, 16.0]), scores([9.0, 17.0])], "sparse": [scores([7.0, 13.0])]}
  found = outcome_of(suite, ("dense", "sparse"), held_out)
  dense, sparse, _ = found.members
  assert dense.runs == ("dense", "dense-seed1") and sparse.runs == ("sparse",)
  assert dense.bits_per_byte == pytest.approx((3.0 + 3.25) / 2) and not found.complete
  assert found.seed_degrees_of_freedom == 1
  assert found.bits_per_byte_seed_stddev == pytest.approx(np.std([3.0, 3.25], ddof=1))
  assert dense.bits_per_byte_stderr > 1.0 / 8 * 8 / 2 / 4
  low, high = found.pairs[0].bits_per_byte_difference_interval
  assert low < found.pairs[0].bits_per_byte_difference < high
  assert outcome_of(suite, ("dense", "sparse", "wide"), dict.fromkeys(STEP_TIMES_S, held_out["dense"])).complete


@pytest.mark.parametrize("scored", [(), ("dense",), ("sparse",)])
def test_there_is_no_difference_before_both_are_scored(tiny_suite, scored):
  (pair,) = outcome_of(tiny_suite, scored).pairs
  assert {value for key, value in vars(pair).items() if "difference" in key} == {None}
  assert pair.verdict.endswith("not trained yet")


def test_models_that_were_scored_on_different_text_are_not_compared(tiny_suite):
  other = replace(scores([7.0, 13.0]), targets=TARGETS + 1)
  with pytest.raises(ValueError, match="different held-out text"):
    outcome_of(tiny_suite, ("dense", "sparse"), {"dense": [scores([8.0, 16.0])], "sparse": [other]})
