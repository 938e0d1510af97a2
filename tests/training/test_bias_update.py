"""The bias of a router moves against the load, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.training.bias_update import update_bias


@pytest.mark.parametrize("stacked", [True, False])
def test_the_bias_of_each_layer_rises_where_its_load_is_below_the_mean_and_falls_where_it_is_above(stacked):
  choices_LE = jnp.array([[2, 1, 1, 0], [2, 8, 5, 5]])
  moved_LE = [[-0.01, 0.0, 0.0, 0.01], [0.01, -0.01, 0.0, 0.0]]
  bias_LE = jnp.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
  if stacked:
    parameters = {"layers": {"bias_E": bias_LE, "w": jnp.ones(3)}}
  else:
    parameters = {"layers": [{"bias_E": bias_LE[0], "w": jnp.ones(3)}, {"bias_E": bias_LE[1], "w": jnp.ones(3)}]}
  updated = update_bias(parameters, choices_LE, 0.01)
  moved = [new - old for new, old in zip(jax.tree.leaves(updated), jax.tree.leaves(parameters), strict=True)]
  moved = [rows for rows in moved if rows.shape[-1] == 4]
  np.testing.assert_allclose(np.concatenate([np.atleast_2d(rows) for rows in moved]), moved_LE, atol=1e-6)
  assert all((leaf == 1.0).all() for leaf in jax.tree.leaves(updated) if leaf.shape == (3,))


def test_a_period_of_several_sparse_layers_has_a_stack_of_each_and_the_choices_of_all_in_the_order_of_layers():
  chosen = [0, 1, 2, 3, 0, 1, 2]  # by each layer, of which the last is a module for multi-token prediction
  choices_LE = 4 * jax.nn.one_hot(jnp.array(chosen), 4, dtype=jnp.int32)
  of_layer = {"feed_forward": {"bias_E": jnp.zeros(4)}}
  stacks = [{"feed_forward": {"bias_E": jnp.zeros((3, 4))}}, {"block": {"feed_forward": {"bias_E": jnp.zeros((3, 4))}}}]
  updated = update_bias({"layers": {"blocks": stacks}, "multi_token": [of_layer]}, choices_LE, 1.0)
  falls = [np.argmin(bias, axis=-1).tolist() for bias in jax.tree.leaves(updated)]
  assert falls == [chosen[0:6:2], chosen[1:6:2], chosen[6]]


@pytest.mark.slow
@pytest.mark.parametrize("E", [7, 24, 48, 60, 96, 160])
def test_loads_that_are_equal_move_no_bias_whatever_the_number_of_experts(E):
  each_L1 = jnp.array([[0], [1], [17], [1000], [2**23 + 1]], jnp.int32)
  moved_LE = update_bias({"bias_E": jnp.zeros((5, E))}, jnp.broadcast_to(each_L1, (5, E)), 0.001)["bias_E"]
  assert not np.asarray(moved_LE).any()


@pytest.mark.parametrize("E", [6, 160])
def test_the_bias_moves_against_the_difference_from_the_exact_mean(E):
  random = np.random.default_rng(E)
  choices_LE = random.choice([10, 1000, 2**23], (200, 1)) - random.integers(0, 3, (200, E))
  moved_LE = update_bias({"bias_E": jnp.zeros((200, E))}, jnp.asarray(choices_LE, jnp.int32), 1.0)["bias_E"]
  direction_LE = np.sign(choices_LE.sum(axis=1, keepdims=True) - E * choices_LE)
  assert (direction_LE == 0).any()
  np.testing.assert_array_equal(moved_LE, direction_LE)
