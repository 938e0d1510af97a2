"""Sparse layers: capacity by hand, and what is refused."""

import dataclasses

import pytest

from moejax.config import MoE
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
    ({"group_size": 500, "num_experts": 10, "experts_per_token": 1, "capacity_factor": 1.1}, 55),  # 55.00000000000001
    ({"group_size": 64, "capacity_factor": 4.0}, 64),
    ({"group_size": 64, "capacity_factor": 5.0}, 64),  # 80: more than all tokens of the group never come
    ({"group_size": 2, "num_experts": 64, "capacity_factor": 0.1}, 1),
  ],
)
def test_capacity_is_the_factor_times_the_balanced_load_rounded_up_and_between_1_and_the_group(fields, rows):
  assert moe(**fields).capacity == rows


def test_2_with_top_2_in_gshard_is_1_here():
  tokens, experts, gshard_factor = 256, 16, 2.0
  assert moe(num_experts=experts, group_size=tokens, capacity_factor=1.0).capacity == gshard_factor * tokens / experts


def test_a_factor_of_experts_over_choices_takes_every_token():
  assert moe(num_experts=8, experts_per_token=2, group_size=64, capacity_factor=4.0).capacity == 64


def test_all_experts_may_be_chosen():
  assert moe(num_experts=2, experts_per_token=2).capacity == 256


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


def test_who_goes_first_is_one_of_two_ways():
  assert [moe(priority=priority).priority for priority in ("choice", "token")] == ["choice", "token"]
  with pytest.raises(UserError, match=r"^moe\.priority='random' is not one of choice, token$"):
    moe(priority="random")


def test_it_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    moe().d_ff = 3  # type: ignore[misc]
