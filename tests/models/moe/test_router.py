"""Routing decisions, auxiliary losses and statistics by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import DATA_EXPERT_MODEL, Mesh
from moejax.models.moe.router import load_balance_loss, router_z_loss, top_k_softmax
from moejax.partitioning import make_partitioner

ONE_DEVICE = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])


def route(logits_ME, valid_M=None, experts_per_token=2, renormalize=True):
  logits_OUME = jnp.asarray(logits_ME, jnp.float32)[None, None]
  valid_OUM = jnp.ones(logits_OUME.shape[:3], bool) if valid_M is None else jnp.asarray(valid_M)[None, None]
  return top_k_softmax(logits_OUME, valid_OUM, experts_per_token, renormalize, ONE_DEVICE)


def test_the_best_experts_are_chosen_best_first():
  routing = route([[0.0, 3.0, 1.0], [2.0, 0.0, 5.0]])
  np.testing.assert_array_equal(routing.experts_OUMA[0, 0], [[1, 2], [2, 0]])


def test_renormalised_weights_sum_to_one_and_others_are_probabilities():
  logits_ME = np.log([[0.5, 0.3, 0.2]])
  np.testing.assert_allclose(route(logits_ME).weights_OUMA[0, 0, 0], [0.625, 0.375], rtol=1e-6)
  np.testing.assert_allclose(route(logits_ME, renormalize=False).weights_OUMA[0, 0, 0], [0.5, 0.3], rtol=1e-6)


def test_balance_loss_is_one_when_balanced_and_the_number_of_experts_when_all_choose_one():
  balanced_ME = 30.0 * np.eye(4)
  collapsed_ME = 30.0 * np.eye(4)[[0, 0, 0, 0]]
  assert float(route(balanced_ME, experts_per_token=1).losses["load_balance"]) == pytest.approx(1.0, rel=1e-5)
  assert float(route(collapsed_ME, experts_per_token=1).losses["load_balance"]) == pytest.approx(4.0, rel=1e-5)


def test_balance_loss_is_taken_in_each_group_and_then_averaged():
  one_hot_UME = jnp.eye(2)[jnp.array([[0, 0], [1, 1]])]
  loss = load_balance_loss(one_hot_UME[None], one_hot_UME[None], jnp.ones((1, 2, 2), bool))
  assert float(loss) == pytest.approx(2.0)  # over both groups together it would be 1


def test_the_gradient_of_the_balance_loss_reaches_the_router_and_lowers_the_crowded_expert():
  def loss(logits_ME):
    return route(logits_ME, experts_per_token=1).losses["load_balance"]

  gradient_ME = jax.grad(loss)(jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
  assert (gradient_ME[:, 0] > 0).all() and (gradient_ME[:, 1] < 0).all()


def test_router_z_loss_is_the_mean_squared_log_normaliser():
  logits_OUME = jnp.log(jnp.array([[[[1.0, 1.0], [3.0, 5.0]]]]))
  expected = (np.log(2.0) ** 2 + np.log(8.0) ** 2) / 2
  assert float(router_z_loss(logits_OUME, jnp.ones((1, 1, 2), bool))) == pytest.approx(expected, rel=1e-6)


def test_padding_weighs_nothing_and_counts_in_no_loss_or_statistic():
  logits_ME = jax.random.normal(jax.random.key(0), (4, 3))
  padded = route(jnp.concatenate([logits_ME, 9.0 * jnp.ones((3, 3))]), [True] * 4 + [False] * 3)
  alone = route(logits_ME)
  for name in ("load_balance", "router_z"):
    assert float(padded.losses[name]) == pytest.approx(float(alone.losses[name]), rel=1e-6)
  for name in ("load", "entropy"):
    np.testing.assert_allclose(padded.statistics[name], alone.statistics[name], rtol=1e-6)
  np.testing.assert_array_equal(padded.weights_OUMA[0, 0, 4:], 0.0)


def test_load_is_each_experts_share_of_choices_and_entropy_is_in_nats():
  routing = route([[9.0, 8.0, 0.0], [9.0, 0.0, 8.0]])
  np.testing.assert_allclose(routing.statistics["load"], [0.5, 0.25, 0.25])
  uniform = route(np.zeros((2, 3)))
  assert float(uniform.statistics["entropy"]) == pytest.approx(np.log(3.0), rel=1e-6)
