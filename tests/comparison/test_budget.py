"""Equal time, in steps: budgets by hand."""

from dataclasses import replace

import pytest
from counting import Filled

from moejax.comparison.budget import Allotment, allot
from moejax.comparison.match import match
from moejax.config import Suite
from moejax.errors import UserError

TIMES = {"dense": 0.5, "sparse": 0.75, "wide": 0.25}


def with_steps(suite: Suite, steps: int | None) -> Suite:
  (pair,) = suite.pairs
  dense = replace(pair.dense, training=replace(pair.dense.training, steps=steps))
  return replace(suite, pairs=(replace(pair, dense=dense),))


def allotted(suite: Suite, times: dict[str, float], fill: float = 1.0) -> dict[str, Allotment]:
  return {allotment.name: allotment for allotment in allot(suite, match(suite, times), times, Filled(fill))}


def test_every_member_gets_the_dense_members_time_and_the_whole_steps_that_fit_in_it(tiny_suite):
  assert allot(with_steps(tiny_suite, 100), match(tiny_suite, TIMES), TIMES, Filled()) == [
    Allotment(name="dense", pair="dense", budget_s=50.0, steps=100, tokens=100 * 256, trained=True),
    Allotment(name="sparse", pair="dense", budget_s=50.0, steps=66, tokens=66 * 256, trained=True),  # 66.7
    Allotment(name="wide", pair="dense", budget_s=50.0, steps=200, tokens=200 * 256, trained=True),
  ]


def test_without_set_steps_the_dense_member_gets_its_compute_optimal_ones(tiny_suite):
  allotments = allotted(tiny_suite, TIMES)
  assert allotments["dense"].steps == 637  # 20 x 8144 / 256 = 636.25
  assert allotments["sparse"].budget_s == 637 * 0.5
  assert allotments["sparse"].steps == 424  # 424.67


def test_padding_gives_the_pair_more_time_and_every_member_the_real_tokens_of_its_steps(tiny_suite):
  allotments = allotted(tiny_suite, TIMES, fill=0.5)
  assert allotments["dense"].steps == 1274 and allotments["dense"].tokens == 1274 * 128 >= 20 * 8144
  assert allotments["sparse"].budget_s == 1274 * 0.5
  assert (allotments["wide"].steps, allotments["wide"].tokens) == (2548, 2548 * 128)


def test_the_dense_member_gets_exactly_its_own_steps_whatever_rounding_does(tiny_suite):
  suite = with_steps(tiny_suite, 4958)
  step_s = 0.9304613615893226
  assert int(4958 * step_s / step_s) == 4957
  assert allotted(suite, TIMES | {"dense": step_s})["dense"].steps == 4958


def test_a_candidates_own_steps_do_not_count(tiny_suite):
  (pair,) = with_steps(tiny_suite, 100).pairs
  candidates = tuple(replace(c, training=replace(c.training, steps=7)) for c in pair.candidates)
  suite = replace(tiny_suite, pairs=(replace(pair, candidates=candidates),))
  assert allotted(suite, TIMES)["wide"].steps == 200


def test_tokens_are_counted_in_the_members_own_batches(tiny_suite):
  (pair,) = with_steps(tiny_suite, 100).pairs
  candidates = tuple(replace(c, training=replace(c.training, batch_size=16)) for c in pair.candidates)
  suite = replace(tiny_suite, pairs=(replace(pair, candidates=candidates),))
  allotments = allotted(suite, TIMES)
  assert (allotments["dense"].tokens, allotments["wide"].tokens) == (100 * 256, 200 * 512)


def test_with_matched_only_the_dense_member_and_its_nearest_are_trained(tiny_suite):
  suite = replace(tiny_suite, train="matched")
  assert {name: a.trained for name, a in allotted(suite, TIMES).items()} == {
    "dense": True,
    "sparse": True,  # 1.5 times as slow is nearer than twice as fast
    "wide": False,
  }
  assert all(allotment.trained for allotment in allotted(tiny_suite, TIMES).values())


def test_a_candidate_whose_step_takes_the_whole_budget_gets_one_step(tiny_suite):
  assert allotted(with_steps(tiny_suite, 2), TIMES | {"sparse": 1.0})["sparse"].steps == 1


def test_a_candidate_whose_step_takes_longer_is_refused_with_both_times(tiny_suite):
  with pytest.raises(
    UserError,
    match=r"^one step of sparse takes 1\.5 s, but the budget of dense is 1 s; "
    "give the dense model more tokens or the candidate fewer parameters$",
  ):
    allotted(with_steps(tiny_suite, 2), TIMES | {"sparse": 1.5})
