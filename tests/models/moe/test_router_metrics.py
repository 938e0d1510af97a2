"""Auxiliary losses and statistics of routers, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.moe import LOSSES_OF_SPARSE_LAYERS
from moejax.models.moe.router_counts import count_choices, count_probabilities, sum_counts, token_counts
from moejax.models.moe.router_metrics import auxiliary_losses, statistics
from moejax.models.moe.routing import Routing


def of(probs_BTE, group=None, valid_BT=None, experts_per_token=1):
  """Losses and statistics where each token takes its most probable experts; groups of `group` tokens."""
  probs_BTE = jnp.asarray(probs_BTE, jnp.float32)
  valid_BT = jnp.ones(probs_BTE.shape[:2], bool) if valid_BT is None else jnp.asarray(valid_BT)
  found, statistics = _of(probs_BTE, valid_BT, group or probs_BTE.shape[1], experts_per_token)
  return {name: float(value[0]) for name, value in found.items()}, {
    name: value[0] for name, value in statistics.items()
  }


@functools.partial(jax.jit, static_argnums=(2, 3))
def _of(probs_BTE, valid_BT, group, experts_per_token):
  probs_OUME = probs_BTE.reshape(1, -1, group, probs_BTE.shape[-1])
  weights_OUMA, experts_OUMA = jax.lax.top_k(probs_OUME, experts_per_token)
  chosen_OUMA = jnp.broadcast_to(valid_BT.reshape(probs_OUME.shape[:3])[..., None], weights_OUMA.shape)
  routing = Routing(experts_OUMA, weights_OUMA, chosen_OUMA)
  sums, counts = counted(jnp.log(probs_OUME), probs_OUME, routing, valid_BT), token_counts(valid_BT, group)
  return auxiliary_losses(sums, counts, LOSSES_OF_SPARSE_LAYERS), statistics(sums, counts)


def counted(logits_OUME, probs_OUME, routing, valid_BT):
  """The sums of a model of one layer."""
  valid_OUM, T = valid_BT.reshape(probs_OUME.shape[:3]), valid_BT.shape[1]
  of_layer = count_probabilities(probs_OUME, valid_OUM, T)
  of_layer |= count_choices(logits_OUME, routing, valid_OUM, jnp.zeros(probs_OUME.shape[:2]), T)
  return sum_counts(jax.tree.map(lambda x: x[None], of_layer), probs_OUME.shape[2], T)


SURE = np.eye(4) * (1 - 4e-9) + 1e-9
BALANCES = ("load_balance", "sequence_balance", "global_balance")


@pytest.mark.parametrize("name", BALANCES)
def test_a_balance_loss_is_one_when_balanced_and_the_number_of_experts_when_all_choose_one(name):
  assert of(SURE[None])[0][name] == pytest.approx(1.0, rel=1e-5)
  assert of(SURE[None, [0, 0, 0, 0]])[0][name] == pytest.approx(4.0, rel=1e-5)


def test_balance_within_groups_within_sequences_and_over_the_batch_differ():
  # Two sequences of four tokens; one uses experts 0 and 1 in turn, the other 2 and 3, in groups of two tokens.
  probs_BTE = SURE[np.array([[0, 0, 1, 1], [2, 2, 3, 3]])]
  found, _ = of(probs_BTE, group=2)
  assert [found[name] for name in BALANCES] == pytest.approx([4.0, 2.0, 1.0], rel=1e-5)
  # In groups that hold both sequences.
  found, _ = of(probs_BTE, group=8)
  assert [found[name] for name in BALANCES] == pytest.approx([1.0, 2.0, 1.0], rel=1e-5)


def test_the_gradient_of_each_balance_loss_reaches_the_router_and_lowers_the_crowded_expert():
  for name in BALANCES:

    def loss(logits_ME, name=name):
      probs_OUME = jax.nn.softmax(logits_ME)[None, None]
      _, experts_OUMA = jax.lax.top_k(probs_OUME, 1)
      routing = Routing(experts_OUMA, jnp.ones(experts_OUMA.shape), jnp.ones(experts_OUMA.shape, bool))
      valid_BT = jnp.ones((1, 4), bool)
      sums = counted(logits_ME[None, None], probs_OUME, routing, valid_BT)
      return auxiliary_losses(sums, token_counts(valid_BT, 4), [name])[name][0]

    gradient_ME = jax.jit(jax.grad(loss))(jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert (gradient_ME[:, 0] > 0).all() and (gradient_ME[:, 1] < 0).all(), name


def test_router_z_loss_is_the_mean_squared_log_normalizer():
  probs_BTE = jnp.array([[[1.0, 1.0], [3.0, 5.0]]])  # exponentials of logits, not normalized
  assert of(probs_BTE)[0]["router_z"] == pytest.approx((np.log(2.0) ** 2 + np.log(8.0) ** 2) / 2, rel=1e-6)


@pytest.mark.parametrize(
  ("probs_TE", "loss"),
  [
    (SURE, -np.log(4.0)),  # each token is sure, and all experts are used
    (SURE[[0, 0, 0, 0]], 0.0),  # sure, and always of one
    (np.full((4, 4), 0.25), 0.0),  # the token tells nothing
    ([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], np.log(2.0) - np.log(4.0)),
  ],
)
def test_mutual_information_is_lowest_where_tokens_are_sure_and_experts_are_used(probs_TE, loss):
  assert of(np.asarray(probs_TE)[None] + 1e-12)[0]["mutual_information"] == pytest.approx(loss, abs=1e-5)


def test_padding_counts_in_no_loss_or_statistic():
  probs_BTE = jax.nn.softmax(jax.random.normal(jax.random.key(0), (1, 4, 3)))
  junk_BTE = jnp.tile(jnp.array([[[9.8, 0.1, 0.1]]]), (1, 3, 1))  # its normalizer would show in the router's z-loss
  padded = jnp.concatenate([probs_BTE, junk_BTE], axis=1)
  alone = of(probs_BTE, experts_per_token=2)
  with_padding = of(padded, valid_BT=[[True] * 4 + [False] * 3], experts_per_token=2)
  assert with_padding[0] == pytest.approx(alone[0], rel=1e-5)
  for name in alone[1]:
    np.testing.assert_allclose(with_padding[1][name], alone[1][name], rtol=1e-6)


def test_a_group_without_tokens_is_no_balanced_group():
  found, _ = of(SURE[None, [0, 0, 1, 1]], group=2, valid_BT=[[True, True, False, False]])
  assert found["load_balance"] == pytest.approx(4.0, rel=1e-5)


def test_load_is_each_experts_share_of_choices_and_entropy_is_in_nats():
  _, found = of([[[0.5, 0.4, 0.1], [0.5, 0.1, 0.4]]], experts_per_token=2)
  np.testing.assert_allclose(found["load"], [0.5, 0.25, 0.25])
  assert float(found["choices_per_token"]) == 2.0
  _, uniform = of(np.full((1, 2, 3), 1 / 3))
  assert float(uniform["entropy"]) == pytest.approx(np.log(3.0), rel=1e-6)


def test_choices_are_counted_exactly_beyond_what_float32_counts():
  sets = {"choices": jnp.full((1, 1, 3, 2), 2.0**24).at[0, 0, 0, 0].set(1.0)}
  zeros = {"probs": jnp.zeros((1, 1, 3, 2)), "entropy": jnp.zeros((1, 1, 3)), "tokens": jnp.ones((1, 1, 3))}
  zeros |= {"dropped": jnp.zeros((1, 1, 1)), "squared_normalizer": jnp.zeros((1, 1, 3))}
  np.testing.assert_array_equal(sum_counts(sets | zeros, 4, 4)["choices"], [[2**25 + 1, 3 * 2**24]])
