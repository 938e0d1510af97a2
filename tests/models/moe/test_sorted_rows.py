"""Tokens to rows sorted by expert and back, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models.moe.sorted_rows import _stable_argsort, combine_rows, sort_by_expert, take_rows

EXPERTS_MA = np.array([[2, 0], [0, 1], [2, 1], [5, -1]])  # 5 and -1 are somebody else's
CHOSEN_MA = np.array([[True, True], [True, False], [True, True], [True, True]])


sort = jax.jit(sort_by_expert, static_argnums=(2, 3))


def order(rows=6):
  return sort(jnp.asarray(EXPERTS_MA), jnp.asarray(CHOSEN_MA), 3, rows)


def test_rows_are_sorted_by_expert_and_then_by_token_and_void_choices_have_none():
  found = order()
  np.testing.assert_array_equal(found.sizes_E, [2, 1, 2])
  np.testing.assert_array_equal(found.choice_R[:5], [1, 2, 5, 0, 4])
  np.testing.assert_array_equal(found.row_MA, [[3, 0], [1, 6], [4, 2], [6, 6]])


@pytest.mark.parametrize("limit", [5, 2**29, 2**29 + 2, 2**30 + 5])
def test_keys_and_places_that_do_not_fit_into_one_number_are_sorted_all_the_same(limit):
  """Four keys: from a limit of 2^29 on, key x 4 + place may be beyond 2^31."""
  found = _stable_argsort(jnp.array([limit - 1, 0, limit - 1, 3], jnp.int32), limit)
  np.testing.assert_array_equal(found, [1, 3, 0, 2])


def test_an_expert_without_tokens_has_no_rows():
  found = sort(jnp.array([[0], [3]]), jnp.ones((2, 1), bool), 4, 2)
  np.testing.assert_array_equal(found.sizes_E, [1, 0, 0, 1])


@pytest.mark.parametrize("rows", [5, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (6, 8))])
def test_taking_and_combining_equal_loops_and_so_do_their_gradients(rows):
  random = np.random.default_rng(0)
  x_MD, weights_MA = random.normal(size=(4, 3)), random.normal(size=(4, 2))
  scale_E = np.array([2.0, 3.0, 5.0])

  def fast(x_MD, weights_MA):
    found = order(rows)
    scale_R = jnp.repeat(jnp.asarray(scale_E, jnp.float32), found.sizes_E, total_repeat_length=rows)
    return combine_rows(jnp.square(take_rows(x_MD, found)) * scale_R[:, None], weights_MA, found)

  def loop(x_MD, weights_MA):
    out = jnp.zeros((4, 3))
    for m, a in zip(*np.nonzero(CHOSEN_MA & (EXPERTS_MA >= 0) & (EXPERTS_MA < 3)), strict=True):
      out = out.at[m].add(weights_MA[m, a] * scale_E[EXPERTS_MA[m, a]] * jnp.square(x_MD[m]))
    return out

  arguments = jnp.asarray(x_MD, jnp.float32), jnp.asarray(weights_MA, jnp.float32)
  of_out = jnp.asarray(random.normal(size=(4, 3)), jnp.float32)

  @functools.partial(jax.jit, static_argnums=0)
  def output_and_gradients(function, *arguments):
    out, pull_back = jax.vjp(function, *arguments)
    return out, *pull_back(of_out)

  mine, theirs = (output_and_gradients(function, *arguments) for function in (fast, loop))
  for one, other in zip(mine, theirs, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_rows_of_no_choice_get_no_gradient():
  found = order(rows=8)
  gradient_RD = jax.grad(lambda rows_RD: jnp.sum(combine_rows(rows_RD, jnp.ones((4, 2)), found)))(jnp.ones((8, 3)))
  np.testing.assert_array_equal(gradient_RD, np.array([1.0] * 5 + [0.0] * 3)[:, None] * np.ones((8, 3)))


def test_sums_over_a_tokens_rows_are_float32_whatever_the_rows_are():
  found = sort(jnp.array([[0, 1]]), jnp.ones((1, 2), bool), 2, 2)
  out = combine_rows(jnp.array([[256.0], [1.0]], jnp.bfloat16), jnp.ones((1, 2)), found)
  assert out.dtype == jnp.float32 and float(out[0, 0]) == 257.0  # bfloat16 rounds it to 256
