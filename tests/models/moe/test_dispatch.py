"""Capacity: who stands where in line for an expert's rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.lookup import find_experiment
from moejax.models.moe.dispatch import capacity_rows
from moejax.models.moe.routing import Routing


def rows(experts_MA, chosen_M=None, priority="choice", num_experts=3):
  """Place in line of each choice, [M, A]."""
  experts_OUMA = np.asarray(experts_MA)[None, None]
  chosen_OUMA = np.ones(experts_OUMA.shape, bool)
  if chosen_M is not None:
    chosen_OUMA = chosen_OUMA & np.asarray(chosen_M)[None, None, :, None]
  row_OUME = run(experts_OUMA, chosen_OUMA, num_experts, priority)
  return np.take_along_axis(np.asarray(row_OUME)[0, 0], np.asarray(experts_MA), axis=-1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def run(experts_OUMA, chosen_OUMA, num_experts, priority):
  return capacity_rows(Routing(experts_OUMA, jnp.ones(experts_OUMA.shape), chosen_OUMA), num_experts, priority)


def test_first_choices_stand_before_any_second_choice():
  # Expert 0: first choices of tokens 1 and 2, then the second choice of token 0, though it comes first.
  np.testing.assert_array_equal(rows([[1, 0], [0, 1], [0, 2]]), [[0, 2], [0, 1], [1, 0]])


def test_with_token_priority_earlier_tokens_stand_before_any_later_one():
  np.testing.assert_array_equal(rows([[1, 0], [0, 1], [0, 2]], priority="token"), [[0, 0], [1, 1], [2, 0]])


@pytest.mark.parametrize("priority", ["choice", "token"])
def test_no_two_choices_have_one_place(priority):
  random = np.random.default_rng(0)
  experts_MA = np.stack([random.permutation(5)[:3] for _ in range(40)])
  places = rows(experts_MA, priority=priority, num_experts=5)
  for e in range(5):
    found = np.sort(places[experts_MA == e])
    np.testing.assert_array_equal(found, np.arange(len(found)))


@pytest.mark.parametrize("priority", ["choice", "token"])
def test_void_choices_stand_nowhere(priority):
  places = rows([[0, 1], [0, 1], [0, 1]], chosen_M=[False, True, True], priority=priority)
  np.testing.assert_array_equal(places, [[-1, -1], [0, 0], [1, 1]])


@pytest.mark.parametrize("name", ["moe_6b4_16e", "moe_6b4_64e"])
def test_random_choices_fill_nearly_all_rows_that_a_group_of_the_scales_has(name):
  moe = find_experiment(name).model.moe
  M, E, C = moe.group_size, moe.num_experts, moe.capacity(moe.group_size)
  random = np.random.default_rng(0)
  groups = [np.argsort(random.random((M, E)))[:, : moe.experts_per_token] for _ in range(8)]
  filled = [np.sum(rows(experts_MA, num_experts=E) < C) / (E * C) for experts_MA in groups]
  assert np.mean(filled) > 0.99
