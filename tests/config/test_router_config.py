"""Routers: what is refused, each in a line with the remedy."""

import pytest

from moejax.config import DenseRouter, ExpertChoiceRouter, Router, ThresholdRouter, TopKRouter, TopPRouter
from moejax.config.kinds import kinds
from moejax.errors import UserError


@pytest.mark.parametrize(
  ("kind", "fields", "message"),
  [
    ("top_k", {"scores": "tanh"}, r"router\.scores='tanh' is not one of softmax, sigmoid$"),
    ("top_p", {"threshold": 1.5}, r"router\.threshold=1\.5 must lie between 0\.0 and 1\.0$"),
    ("top_p", {"threshold": 0.0}, r"router\.threshold=0\.0 must be above 0$"),
    (
      "top_k",
      {"groups_per_token": 2},
      r"router\.groups_per_token=2 is more than router\.expert_groups=1; use at most 1$",
    ),
    ("top_k", {"scale": 0.0}, r"router\.scale=0\.0 must be above 0$"),
    ("threshold", {"threshold": 0.0}, r"router\.threshold=0\.0 must be above 0$"),
    ("dense", {"jitter": 1.0}, r"router\.jitter=1\.0 must be 0 or above and below 1$"),
    ("expert_choice", {"gumbel": -1.0}, r"router\.gumbel=-1\.0 must be 0 or above$"),
    ("top_k", {"bias_rate": -1.0}, r"router\.bias_rate=-1\.0 must be 0 or above$"),
  ],
)
def test_what_cannot_be_meant_is_refused(kind, fields, message):
  with pytest.raises(UserError, match=f"^{message}"):
    kinds(Router)[kind](**fields)


def test_only_jitter_and_gumbel_draw_random_numbers():
  assert not TopKRouter().is_noisy
  assert all(router.is_noisy for router in (DenseRouter(jitter=0.1), TopPRouter(threshold=0.5, gumbel=1.0)))


def test_a_router_without_a_kind_is_top_k():
  assert Router(bias_rate=0.1, scale=2.0) == TopKRouter(bias_rate=0.1, scale=2.0)


def test_facts_of_each_kind():
  facts = ("balanced", "looks_ahead", "every_expert", "has_capacity")
  there = {
    router.kind: [fact for fact in facts if getattr(router, fact)]
    for router in (TopKRouter(), TopPRouter(threshold=0.5), ExpertChoiceRouter(), DenseRouter(), ThresholdRouter())
  }
  assert there == {
    "top_k": [],
    "top_p": [],
    "expert_choice": list(facts),
    "dense": ["balanced", "every_expert"],
    "threshold": ["every_expert"],
  }
  assert ThresholdRouter(equal_counts=True).looks_ahead


def test_a_kind_of_ones_own_cannot_take_the_name_of_a_built_in_one():
  with pytest.raises(UserError, match=r"^'top_k' is the kind of a built-in router; use another kind for Mine$"):

    class Mine(Router, kind="top_k"):
      pass


def test_expert_choice_takes_all_tokens_from_the_capacity_of_all():
  assert ExpertChoiceRouter().takes_all(8, 2, 4.0)
  assert not ExpertChoiceRouter().takes_all(8, 2, 3.99)
