"""Combinations of fields of which one would have no effect."""

from dataclasses import replace

import pytest
from effect_fixtures import sparse

from moejax.config import DenseRouter, EinsumDispatch, ExpertChoiceRouter, GroupedDispatch, Mesh, Router, TopPRouter
from moejax.errors import UserError


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: sparse(experts_per_token=1, router=TopPRouter(threshold=0.5)), r"threshold=0\.5 would have no"),
    (lambda: sparse(router=Router(expert_groups=8, groups_per_token=4)), r"expert_groups=8 would have no effect with"),
    (lambda: Router(expert_groups=4, groups_per_token=4), r"expert_groups=4 would have no effect with"),
    (lambda: sparse(experts_per_token=8, router=Router(bias_rate=0.1)), r"bias_rate=0\.1 would have no effect"),
    (lambda: sparse(experts_per_token=8, dispatch="grouped", router=Router(gumbel=0.1)), r"gumbel=0\.1 would have no"),
    (
      lambda: sparse(capacity_factor=4.0, router=ExpertChoiceRouter(gumbel=0.1)),
      r"gumbel=0\.1 would have no effect",
    ),
    (
      lambda: sparse(dispatch=EinsumDispatch(priority="token"), router=Router(renormalize=False), experts_per_token=1),
      r"priority=token would have no effect",
    ),
    (
      lambda: sparse(dispatch=EinsumDispatch(priority="token"), router=ExpertChoiceRouter()),
      r"priority=token would have no effect",
    ),
    (lambda: sparse(dispatch="dense", router=DenseRouter(), experts_per_token=8), r"group_size=32 would have"),
    (
      lambda: replace(sparse(every=1), matchable=("model.d_ff",)),
      r"matchable='model\.d_ff' would have no effect because every layer is sparse",
    ),
  ],
)  # fmt: skip
def test_a_combination_without_effect_is_an_error(make, message):
  with pytest.raises(UserError, match=message):
    make()


@pytest.mark.parametrize("fields", [{"receive_factor": 2.0}, {"exchange": "all_gather"}, {"exchange_chunks": 2}])
def test_what_this_mesh_gives_no_effect_is_told(fields):
  (caution,) = sparse(dispatch=GroupedDispatch(**fields)).cautions
  assert next(iter(fields)) in caution and "has no effect" in caution
  assert not sparse(Mesh(data=1, expert=2), dispatch=GroupedDispatch(**fields)).cautions
