"""Sparse layers: capacity by hand, and what is refused."""

import dataclasses

import pytest

from moejax.config import DenseRouter, EinsumDispatch, ExpertChoiceRouter, MoE, Router
from moejax.config.moe import BALANCE_LOSSES
from moejax.errors import UserError


def moe(**fields) -> MoE:
  return MoE(**{"num_experts": 8, "experts_per_token": 2, "d_ff": 16, **fields})


@pytest.mark.parametrize(
  ("fields", "rows"),
  [
    ({"group_size": 64}, 16),  # 2 x 64 / 8
    ({"group_size": 64, "capacity_factor": 1.25}, 20),
    ({"group_size": 64, "capacity_factor": 1.3}, 21),  # 20.8 upwards
    ({"group_size": 64, "capacity_factor": 0.5}, 8),
    ({"group_size": 100}, 25),
    ({"group_size": 63}, 16),  # 15.75 upwards
    ({"group_size": 250, "num_experts": 10, "capacity_factor": 1.1}, 55),  # 55.00000000000001
    ({"group_size": 64, "capacity_factor": 4.0}, 64),
    ({"group_size": 64, "capacity_factor": 5.0}, 64),  # 80: more than all tokens of the group never come
    ({"group_size": 2, "num_experts": 64, "capacity_factor": 0.1}, 1),
  ],
)
def test_capacity_is_the_factor_times_the_balanced_load_rounded_up_and_between_1_and_the_group(fields, rows):
  made = moe(**fields)
  assert made.capacity(made.group_tokens(512)) == rows


def test_2_with_top_2_in_gshard_is_1_here():
  tokens, experts, gshard_factor = 256, 16, 2.0
  assert moe(num_experts=experts, capacity_factor=1.0).capacity(tokens) == gshard_factor * tokens / experts


def test_a_factor_of_experts_over_choices_takes_every_token():
  assert moe(num_experts=8, experts_per_token=2, capacity_factor=4.0).capacity(64) == 64


def test_all_experts_may_be_chosen():
  assert moe(num_experts=2, experts_per_token=2).capacity(256) == 256


@pytest.mark.parametrize(
  ("fields", "sequence_length", "tokens"),
  [
    ({"d_ff": 512}, 256, 64),  # an eighth of the width
    ({"d_ff": 16}, 256, 32),  # 8 rows an expert: 8 x 8 / 2
    ({"d_ff": 16, "num_experts": 128}, 4096, 512),
    ({"d_ff": 16384}, 4096, 2048),
    ({"d_ff": 16384}, 300, 300),  # no more than a sequence
    ({"d_ff": 512}, 63, 63),
    ({"d_ff": 512, "group_size": 48}, 256, 48),  # as set
  ],
)
def test_groups_are_as_small_as_masks_want_and_as_large_as_even_loads_want_and_divide_the_sequence(
  fields, sequence_length, tokens
):
  assert moe(**fields).group_tokens(sequence_length) == tokens


def test_fine_grained_experts_have_the_same_width_in_all_and_the_same_choice():
  fine = moe(d_ff=16, num_shared_experts=1).fine_grained(4)
  assert (fine.num_experts, fine.experts_per_token, fine.num_shared_experts, fine.d_ff) == (32, 8, 4, 4)
  with pytest.raises(UserError, match=r"^moe\.d_ff=16 is not divisible by granularity=3; use 15 or 18$"):
    moe(d_ff=16).fine_grained(3)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"dispatch": "grouped", "capacity_factor": 1.25},
      r"moe\.capacity_factor=1\.25 would have no effect: only dispatch einsum",
    ),
    ({"experts_per_token": 1}, r"router\.renormalize=True with moe\.experts_per_token=1 makes every weight 1"),
    (
      {"router": DenseRouter()},
      r"moe\.experts_per_token=2, but router\.kind='dense' uses all experts; set it to 8",
    ),
    ({"router": Router(expert_groups=3)}, r"moe\.num_experts=8 is not divisible by router\.expert_groups=3"),
    ({"router": Router(expert_groups=8)}, r"moe\.experts_per_token=2 is more than the 1 experts in router\.groups_per"),
    ({"weights_on": "inputs"}, r"moe\.weights_on='inputs' needs one expert per token, and moe\.experts_per_token=2"),
    ({"weights_on": "both"}, r"moe\.weights_on='both' is not one of outputs, inputs"),
    (
      {"num_experts": 1, "experts_per_token": 1, "router": DenseRouter(), "weights_on": "inputs"},
      r"moe\.weights_on='inputs' needs .* with router\.kind='dense' may have several; set experts_per_token to 1 with",
    ),
    ({"num_shared_experts": -1}, r"moe\.num_shared_experts=-1 must be 0 or above"),
    ({"dispatch": "random"}, r"moe\.dispatch\.kind is 'random', not one of einsum, grouped, dense"),
  ],
)
def test_what_would_do_nothing_or_cannot_be_is_refused(fields, message):
  with pytest.raises(UserError, match=f"^{message}"):
    moe(**fields)


def test_expert_choice_has_a_capacity_with_every_dispatch():
  router = ExpertChoiceRouter()
  assert moe(dispatch="grouped", router=router, capacity_factor=2.0).capacity(64) == 32


def test_where_experts_are_loaded_alike_by_construction_no_balance_loss_is_returned():
  assert set(moe().losses) > set(BALANCE_LOSSES)
  for router, A in ((ExpertChoiceRouter(), 2), (DenseRouter(), 8)):
    assert moe(router=router, experts_per_token=A).losses == ("router_z", "mutual_information")


def test_a_look_ahead_is_cautioned_against():
  (choice,) = moe().cautions
  assert "dispatch.priority=token" in choice
  (expert_choice,) = moe(router=ExpertChoiceRouter()).cautions
  assert "depend on later tokens" in expert_choice
  assert moe(dispatch=EinsumDispatch(priority="token")).cautions == moe(dispatch="grouped").cautions == ()


@pytest.mark.parametrize(
  "name", ["num_experts", "experts_per_token", "d_ff", "every", "capacity_factor", "group_size"]
)  # fmt: skip
@pytest.mark.parametrize("value", [0, -1])
def test_counts_and_factors_must_be_above_0(name, value):
  with pytest.raises(UserError, match=rf"^moe\.{name}={value} must be above 0$"):
    moe(**{name: value})


def test_more_experts_per_token_than_experts_are_refused_with_both_numbers_and_the_most():
  with pytest.raises(UserError, match=r"^moe\.experts_per_token=9 is more than moe\.num_experts=8; use at most 8$"):
    moe(experts_per_token=9)


def test_a_name_stands_for_a_kind_with_its_defaults():
  assert moe() == moe(dispatch="einsum") == moe(dispatch=EinsumDispatch()) != moe(dispatch="dense")
  assert moe() == moe(router="top_k") != moe(router="expert_choice")
  with pytest.raises(UserError, match=r"^moe\.router\.threshold is missing$"):
    moe(router="top_p")
  with pytest.raises(UserError, match=r"^moe\.router is 3, not an object$"):
    moe(router=3)


def test_it_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    moe().d_ff = 3  # type: ignore[misc]
