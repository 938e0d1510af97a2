"""Routing decisions by hand, one router after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import DATA_EXPERT_MODEL, Mesh, MoE, Router
from moejax.config.kinds import kinds
from moejax.models.moe.router import route
from moejax.models.moe.routing import RouterContext
from moejax.partitioning import make_partitioner

ONE_DEVICE = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])


def routed(
  probs_ME, valid_M=None, experts_per_token=2, bias_E=None, key=None, capacity_factor=1.0, kind="top_k", **router
):
  """The routing of one group whose softmax is `probs_ME`."""
  logits_OUME = jnp.log(jnp.asarray(probs_ME, jnp.float32))[None, None]
  valid_OUM = jnp.ones(logits_OUME.shape[:3], bool) if valid_M is None else jnp.asarray(valid_M)[None, None]
  moe = MoE(
    num_experts=logits_OUME.shape[-1],
    experts_per_token=experts_per_token,
    d_ff=4,
    router=kinds(Router)[kind](**router),
    capacity_factor=capacity_factor,
  )
  context = RouterContext(moe, valid_OUM, ONE_DEVICE, bias_E, None if key is None else key[None])
  return route(moe.router, logits_OUME, context)


def test_the_best_experts_are_chosen_best_first():
  routing = routed([[0.1, 0.6, 0.3], [0.3, 0.1, 0.6]])
  np.testing.assert_array_equal(routing.experts_OUMA[0, 0], [[1, 2], [2, 0]])


def test_renormalized_weights_sum_to_the_scale_and_others_are_scaled_probabilities():
  probs_ME = [[0.5, 0.3, 0.2]]
  np.testing.assert_allclose(routed(probs_ME).weights_OUMA[0, 0, 0], [0.625, 0.375], rtol=1e-6)
  np.testing.assert_allclose(routed(probs_ME, renormalize=False).weights_OUMA[0, 0, 0], [0.5, 0.3], rtol=1e-6)
  np.testing.assert_allclose(routed(probs_ME, scale=2.0).weights_OUMA[0, 0, 0], [1.25, 0.75], rtol=1e-6)


def test_switch_weighs_its_only_expert_by_its_probability():
  routing = routed([[0.5, 0.3, 0.2]], experts_per_token=1, renormalize=False)
  np.testing.assert_allclose(routing.weights_OUMA[0, 0, 0], [0.5], rtol=1e-6)


def test_sigmoid_scores_do_not_compete():
  logits_ME = jnp.log(jnp.array([[4.0, 1.0, 0.25]]))
  routing = routed(jnp.exp(logits_ME), scores="sigmoid", renormalize=False)
  np.testing.assert_allclose(routing.weights_OUMA[0, 0, 0], [0.8, 0.5], rtol=1e-6)


def test_a_bias_decides_who_is_chosen_and_does_not_weigh():
  routing = routed([[0.5, 0.3, 0.2]], bias_E=jnp.array([-1.0, 0.0, 0.0]), renormalize=False, bias_rate=0.001)
  np.testing.assert_array_equal(routing.experts_OUMA[0, 0, 0], [1, 2])
  np.testing.assert_allclose(routing.weights_OUMA[0, 0, 0], [0.3, 0.2], rtol=1e-6)


def test_experts_outside_the_best_groups_are_not_chosen():
  # Groups {0, 1}, {2, 3}, {4, 5}: worth .35, .40 and .25, though the best single expert is in the first.
  probs_ME = [[0.34, 0.01, 0.2, 0.2, 0.24, 0.01]]
  routing = routed(probs_ME, expert_groups=3, groups_per_token=1)
  assert set(np.asarray(routing.experts_OUMA[0, 0, 0]).tolist()) == {2, 3}
  free = routed(probs_ME)
  np.testing.assert_array_equal(free.experts_OUMA[0, 0, 0], [0, 4])


@pytest.mark.parametrize(
  ("threshold", "chosen"),
  [(0.01, [1, 0, 0]), (0.49, [1, 0, 0]), (0.51, [1, 1, 0]), (0.79, [1, 1, 0]), (1.0, [1, 1, 1])],
)
def test_top_p_takes_experts_until_their_probabilities_reach_the_threshold(threshold, chosen):
  routing = routed([[0.5, 0.3, 0.2]], kind="top_p", threshold=threshold, experts_per_token=3, renormalize=False)
  np.testing.assert_array_equal(routing.chosen_OUMA[0, 0, 0], np.array(chosen, bool))
  np.testing.assert_allclose(routing.weights_OUMA[0, 0, 0], np.array([0.5, 0.3, 0.2]) * chosen, rtol=1e-6)


def test_top_p_stops_at_an_expert_with_which_the_threshold_is_just_reached():
  routing = routed([[1.0, 1.0, 1.0]], kind="top_p", threshold=0.5, experts_per_token=3, scores="sigmoid")
  np.testing.assert_array_equal(routing.chosen_OUMA[0, 0, 0], [True, False, False])  # each has a score of one half


def test_top_p_takes_no_more_than_experts_per_token():
  routing = routed([[0.4, 0.3, 0.2, 0.1]], kind="top_p", threshold=1.0, experts_per_token=2)
  np.testing.assert_allclose(routing.weights_OUMA[0, 0, 0], [4 / 7, 3 / 7], rtol=1e-6)


def test_in_expert_choice_each_expert_takes_its_best_tokens():
  probs_ME = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]
  routing = routed(probs_ME, kind="expert_choice", experts_per_token=1)
  np.testing.assert_array_equal(routing.chosen_OUMA[0, 0], [[1, 0], [1, 0], [0, 1], [0, 1]])
  np.testing.assert_allclose(routing.weights_OUMA[0, 0], [[0.9, 0], [0.8, 0], [0, 0.3], [0, 0.4]], rtol=1e-6)


def test_in_expert_choice_tokens_compete_by_their_probabilities_and_not_by_their_logits():
  probs_ME = np.array([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9]])
  raised_ME = probs_ME * np.array([[20.0], [1.0], [1.0], [1.0]])  # a constant on all logits of the first token
  one, other = (routed(each, kind="expert_choice", experts_per_token=1).chosen_OUMA for each in (probs_ME, raised_ME))
  np.testing.assert_array_equal(one, other)


def test_in_expert_choice_a_later_token_can_take_an_earlier_ones_place():
  probs_ME = np.array([[0.6, 0.4], [0.5, 0.5], [0.4, 0.6], [0.4, 0.6]])
  before = routed(probs_ME, kind="expert_choice", experts_per_token=1)
  probs_ME[3] = [0.95, 0.05]
  after = routed(probs_ME, kind="expert_choice", experts_per_token=1)
  assert before.chosen_OUMA[0, 0, 1, 0] and not after.chosen_OUMA[0, 0, 1, 0]


def test_the_dense_router_takes_all_experts_by_their_probabilities():
  routing = routed([[0.5, 0.3, 0.2]], kind="dense", experts_per_token=3)
  assert routing.chosen_OUMA.all()
  np.testing.assert_allclose(routing.weights_OUMA[0, 0, 0], [0.5, 0.3, 0.2], rtol=1e-6)


def test_a_threshold_takes_experts_above_its_multiple_of_a_uniform_probability_and_always_the_best():
  probs_ME = [[0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.34, 0.33, 0.33]]
  routing = routed(probs_ME, kind="threshold", experts_per_token=3, threshold=0.75)
  np.testing.assert_array_equal(routing.chosen_OUMA[0, 0], [[1, 1, 0], [0, 1, 1], [1, 1, 1]])
  np.testing.assert_allclose(routing.weights_OUMA[0, 0, 1], [0.0, 0.3, 0.6], rtol=1e-6)
  routing = routed(probs_ME, kind="threshold", experts_per_token=3, threshold=2.0)
  np.testing.assert_array_equal(routing.chosen_OUMA[0, 0], [[1, 0, 0], [0, 0, 1], [1, 0, 0]])


def test_equal_counts_are_the_rounded_mean_over_real_tokens():
  probs_ME = [[0.5, 0.3, 0.2], [0.05, 0.15, 0.8], [0.05, 0.8, 0.15], [0.34, 0.33, 0.33]]
  router = {"kind": "threshold", "experts_per_token": 3, "threshold": 0.75, "equal_counts": True}
  routing = routed(probs_ME, **router)  # (2 + 1 + 1 + 3) / 4 = 1.75
  np.testing.assert_array_equal(routing.chosen_OUMA[0, 0], [[1, 1, 0], [0, 1, 1], [0, 1, 1], [1, 1, 0]])
  routing = routed(probs_ME, [True, True, True, False], **router)  # 4 / 3
  np.testing.assert_array_equal(routing.chosen_OUMA[0, 0], [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize("kind", ["top_k", "top_p", "expert_choice", "dense", "threshold"])
def test_the_scale_multiplies_every_routers_weights(kind):
  router = {"kind": kind, "experts_per_token": 3}
  router |= {"renormalize": False} if kind in ("top_k", "top_p") else {}
  router |= {"threshold": 0.75} if kind == "top_p" else {}
  probs_ME = [[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]]
  plain, scaled = routed(probs_ME, **router), routed(probs_ME, scale=2.5, **router)
  assert plain.weights_OUMA.any()
  np.testing.assert_allclose(scaled.weights_OUMA, 2.5 * plain.weights_OUMA, rtol=1e-6)
  np.testing.assert_array_equal(scaled.chosen_OUMA, plain.chosen_OUMA)


def test_top_p_with_noise_ranks_by_noisy_scores_and_adds_up_the_scores_themselves():
  probs_ME = jax.nn.softmax(2.0 * jax.random.normal(jax.random.key(1), (500, 4)))
  router = {"kind": "top_p", "threshold": 0.6, "experts_per_token": 4, "renormalize": False}
  routing = routed(probs_ME, key=jax.random.key(0), gumbel=1.0, **router)
  experts_MA = np.asarray(routing.experts_OUMA[0, 0])
  scores_MA = np.take_along_axis(np.asarray(probs_ME), experts_MA, axis=1)
  before_MA = np.cumsum(scores_MA, axis=1) - scores_MA
  expected_MA = (before_MA < 0.6) | (np.arange(4) == 0)
  certain_MA = np.abs(before_MA - 0.6) > 1e-4  # sums round differently
  np.testing.assert_array_equal(np.asarray(routing.chosen_OUMA[0, 0])[certain_MA], expected_MA[certain_MA])
  assert (experts_MA[:, 0] != np.argmax(probs_ME, axis=1)).any(), "noise changes who comes first"


@pytest.mark.parametrize(
  "router",
  [
    {},
    {"kind": "top_p", "threshold": 0.9},
    {"kind": "expert_choice"},
    {"kind": "dense", "experts_per_token": 3},
    {"kind": "threshold", "experts_per_token": 3},
    {"kind": "threshold", "experts_per_token": 3, "equal_counts": True},
  ],
  ids=["top_k", "top_p", "expert_choice", "dense", "threshold", "equal_counts"],
)
def test_padding_chooses_nothing_and_is_chosen_by_nothing(router):
  probs_ME = jax.nn.softmax(jax.random.normal(jax.random.key(0), (4, 3)))
  routing = routed(probs_ME, [True, False, True, False], **router)
  assert not routing.chosen_OUMA[0, 0, 1::2].any()
  assert not routing.weights_OUMA[0, 0, 1::2].any()
  assert routing.chosen_OUMA[0, 0, ::2].any()


@pytest.mark.parametrize("amount", [1.0, 0.5])
def test_gumbel_noise_samples_experts_by_their_probabilities_and_leaves_weights_alone(amount):
  """A smaller amount is a lower temperature: probabilities to the power of 1 / amount."""
  probs_ME = jnp.tile(jnp.array([[0.6, 0.3, 0.1]]), (4000, 1))
  routing = routed(probs_ME, experts_per_token=1, gumbel=amount, renormalize=False, key=jax.random.key(0))
  experts_M = np.asarray(routing.experts_OUMA[0, 0, :, 0])
  # 4000 draws: three standard errors of a share are at most 0.024.
  expected_E = np.array([0.6, 0.3, 0.1]) ** (1 / amount)
  np.testing.assert_allclose(np.bincount(experts_M, minlength=3) / 4000, expected_E / expected_E.sum(), atol=0.024)
  np.testing.assert_allclose(routing.weights_OUMA[0, 0, :, 0], np.array([0.6, 0.3, 0.1])[experts_M], rtol=1e-5)


def test_lists_of_choices_and_tables_by_expert_say_the_same():
  routing = routed([[0.1, 0.6, 0.3], [0.3, 0.1, 0.6]], [True, False])
  np.testing.assert_array_equal(routing.chosen_OUME(3)[0, 0], [[0, 1, 1], [0, 0, 0]])
  np.testing.assert_allclose(routing.weights_OUME(3)[0, 0], [[0, 2 / 3, 1 / 3], [0, 0, 0]], rtol=1e-6)
