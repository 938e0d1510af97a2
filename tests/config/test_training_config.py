"""Losses, budget, checkpoints, training: what is refused."""

import pytest

from moejax.config import Budget, Checkpoints, Losses, Training
from moejax.errors import UserError


@pytest.mark.parametrize("name", ["z", "load_balance", "router_z"])
def test_coefficients_may_be_0_but_not_below(name):
  assert getattr(Losses(**{name: 0.0}), name) == 0.0
  with pytest.raises(UserError, match=rf"^losses\.{name}=-0\.5 must be 0 or above$"):
    Losses(**{name: -0.5})


def test_a_budget_has_tokens_and_counts_parameters_in_one_of_four_ways():
  with pytest.raises(UserError, match=r"^budget\.tokens_per_parameter=0 must be above 0$"):
    Budget(tokens_per_parameter=0)
  with pytest.raises(
    UserError,
    match=r"^budget\.parameters='all' is not one of total, non_embedding, active, active_non_embedding$",
  ):
    Budget(parameters="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["every", "keep_last", "keep_every"])
def test_checkpoints_come_after_a_step_or_more(name):
  with pytest.raises(UserError, match=rf"^checkpoints\.{name}=0 must be above 0$"):
    Checkpoints(**{name: 0})


def test_checkpoints_that_are_kept_for_ever_must_be_among_those_that_are_made():
  assert Checkpoints(every=100, keep_every=500).keep_every == 500
  with pytest.raises(
    UserError, match=r"^checkpoints\.keep_every=250 is not divisible by checkpoints\.every=100; use 200 or 300$"
  ):
    Checkpoints(every=100, keep_every=250)


@pytest.mark.parametrize("name", ["batch_size", "gradient_accumulation", "log_every", "steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_of_a_run_must_be_above_0(name, value):
  with pytest.raises(UserError, match=rf"^training\.{name}={value} must be above 0$"):
    Training(**{"batch_size": 8, name: value})


def test_a_seed_is_one_that_differs_from_all_others():
  assert Training(batch_size=8, seed=2**32 - 1).seed == 2**32 - 1
  with pytest.raises(UserError, match=r"^training\.seed=-1 must be 0 or above and below 2\^32"):
    Training(batch_size=8, seed=-1)
  with pytest.raises(UserError, match=r"^training\.seed=4294967296 must"):  # JAX would take it for 0
    Training(batch_size=8, seed=2**32)


@pytest.mark.parametrize(("batch", "nearest"), [(15, "12 or 16"), (3, "4")])
def test_the_parts_of_a_batch_are_equal_or_the_nearest_batches_are_named(batch, nearest):
  with pytest.raises(
    UserError,
    match=rf"^training\.batch_size={batch} is not divisible by training\.gradient_accumulation=4; use {nearest}$",
  ):
    Training(batch_size=batch, gradient_accumulation=4)
