"""Capacity: who gets a row, who is dropped, and that nothing else is lost."""

import jax.numpy as jnp
import numpy as np

from moejax.models.moe.dispatch import capacity_slots
from moejax.models.moe.router import Routing


def routing_of(experts_MA, valid_M=None):
  experts_OUMA = jnp.asarray(experts_MA)[None, None]
  valid_OUM = jnp.ones(experts_OUMA.shape[:3], bool) if valid_M is None else jnp.asarray(valid_M)[None, None]
  return Routing(experts_OUMA, jnp.ones(experts_OUMA.shape), valid_OUM, {}, {})


def slots(experts_MA, capacity, valid_M=None, priority="choice"):
  slots_OUMA, kept_OUMA = capacity_slots(routing_of(experts_MA, valid_M), 3, capacity, priority)
  return np.asarray(slots_OUMA[0, 0]), np.asarray(kept_OUMA[0, 0])


def test_first_choices_take_rows_before_any_second_choice():
  _, kept_MA = slots([[1, 0], [0, 1], [0, 2]], capacity=2)
  # Expert 0: first choices of tokens 1 and 2 fill it, the second choice of token 0 is dropped though it comes first.
  np.testing.assert_array_equal(kept_MA, [[True, False], [True, True], [True, True]])


def test_with_token_priority_earlier_tokens_take_rows_before_any_later_one():
  _, kept_MA = slots([[1, 0], [0, 1], [0, 2]], capacity=2, priority="token")
  np.testing.assert_array_equal(kept_MA, [[True, True], [True, True], [False, True]])


def test_rows_go_in_the_order_of_tokens_and_no_two_choices_share_one():
  slots_MA, kept_MA = slots([[0, 1], [0, 1], [0, 1], [0, 2]], capacity=3)
  np.testing.assert_array_equal(kept_MA, [[True, True], [True, True], [True, True], [False, True]])
  np.testing.assert_array_equal(slots_MA[kept_MA], [0, 3, 1, 4, 2, 5, 6])


def test_padding_takes_no_capacity():
  _, kept_MA = slots([[0, 1], [0, 1], [0, 1]], capacity=1, valid_M=[False, True, True])
  np.testing.assert_array_equal(kept_MA, [[False, False], [True, True], [False, False]])


def test_a_capacity_of_all_tokens_drops_nothing():
  _, kept_MA = slots([[0, 1]] * 5, capacity=5)
  assert kept_MA.all()
