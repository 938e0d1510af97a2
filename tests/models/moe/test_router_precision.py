"""Choices, weights, probabilities and their gradients for logits of any size, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import DATA_EXPERT_MODEL, DenseRouter, Mesh, MoE, Router
from moejax.config.kinds import kinds
from moejax.models.moe.router import route
from moejax.models.moe.router_counts import count_choices, count_probabilities, sum_counts, token_counts
from moejax.models.moe.router_metrics import auxiliary_losses, statistics
from moejax.models.moe.routers.scores import probabilities
from moejax.models.moe.routing import RouterContext
from moejax.partitioning import make_partitioner

ONE_DEVICE = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
M, E = 512, 8
SCORES = ("softmax", "sigmoid")

ROUTERS = {
  f"{name}, {scores}": (biases, kinds(Router)[kind](scores=scores, **fields))
  for scores in SCORES
  for name, biases, kind, fields in (
    ("renormalized", None, "top_k", {}),
    ("scores", None, "top_k", {"renormalize": False}),
    ("equal biases", [0.0] * E, "top_k", {"bias_rate": 0.001, "scale": 2.5}),
    ("biases in steps", [0.0, 0.1, 0.1, -0.2, 0.0, 0.3, 0.1, 0.0], "top_k", {"bias_rate": 0.001}),
    ("groups", None, "top_k", {"expert_groups": 4, "groups_per_token": 2}),
    ("biased groups", [0.1, 0.0] * 4, "top_k", {"expert_groups": 4, "groups_per_token": 2, "bias_rate": 0.001}),
    ("top_p", None, "top_p", {"threshold": 0.7}),
    ("top_p of scores", None, "top_p", {"threshold": 0.7, "renormalize": False}),
    ("expert_choice", None, "expert_choice", {}),
  )
} | {"dense": (None, DenseRouter())}


def drawn_logits():
  """Rows over all of [-200, 200], rows that lie near each other anywhere in it, and ordinary ones."""
  random = np.random.default_rng(0)
  anywhere = random.uniform(-200, 200, (M // 4, E))
  together = random.uniform(-190, 190, (M // 2, 1)) + random.normal(0, 3, (M // 2, E))
  return np.concatenate([anywhere, together, random.normal(0, 1, (M // 4, E))]).astype(np.float32)


LOGITS_ME = drawn_logits()
UP_ME = np.random.default_rng(1).normal(0, 1, (M, E))
"""Of the output by each weight."""


def log_scores_of(logits_ME, router):
  """In float64, where no score of these logits underflows."""
  logits_ME = np.asarray(logits_ME, np.float64)
  if router.scores == "sigmoid":
    return -np.logaddexp(0, -logits_ME)
  top = logits_ME.max(axis=1, keepdims=True)
  return logits_ME - top - np.log(np.exp(logits_ME - top).sum(axis=1, keepdims=True))


def slope(of_log_score_ME, logits_ME, router):
  """From the gradient by log-scores to that by logits."""
  logits_ME = np.asarray(logits_ME, np.float64)
  if router.scores == "sigmoid":
    return of_log_score_ME / (1 + np.exp(logits_ME))
  return of_log_score_ME - np.exp(log_scores_of(logits_ME, router)) * of_log_score_ME.sum(axis=1, keepdims=True)


def expected(chosen_ME, logits_ME, router):
  """Weights of these choices, and the gradient of their product with UP."""
  scores_ME = np.exp(log_scores_of(logits_ME, router)) * chosen_ME
  weights_ME = router.scale * (scores_ME / scores_ME.sum(axis=1, keepdims=True) if router.renormalize else scores_ME)
  of_log_score_ME = weights_ME * UP_ME
  if router.renormalize:
    of_log_score_ME = of_log_score_ME - weights_ME / router.scale * of_log_score_ME.sum(axis=1, keepdims=True)
  return weights_ME, slope(of_log_score_ME, logits_ME, router)


def routed(logits_ME, router, biases, experts_per_token):
  moe = MoE(num_experts=E, experts_per_token=experts_per_token, d_ff=4, router=router, dispatch="grouped")
  valid_OUM = jnp.ones((1, 1, len(logits_ME)), bool)
  bias_E = None if biases is None else jnp.asarray(biases)
  return route(router, logits_ME[None, None], RouterContext(moe, valid_OUM, ONE_DEVICE, bias_E))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
def test_weights_and_gradients_equal_float64_for_logits_from_minus_200_to_200(name):
  biases, router = ROUTERS[name]

  def output(logits_ME):
    routing = routed(logits_ME, router, biases, E if router.kind == "dense" else 3)
    weights_ME = routing.weights_OUME(E)[0, 0]
    return jnp.sum(weights_ME * UP_ME.astype(np.float32)), (weights_ME, routing.chosen_OUME(E)[0, 0])

  (_, (weights_ME, chosen_ME)), gradient_ME = jax.jit(jax.value_and_grad(output, has_aux=True))(LOGITS_ME)
  wanted_ME, of_logits_ME = expected(np.asarray(chosen_ME, np.float64), LOGITS_ME, router)
  np.testing.assert_allclose(weights_ME, wanted_ME, rtol=2e-4, atol=1e-6)
  np.testing.assert_allclose(gradient_ME, of_logits_ME, rtol=2e-4, atol=2e-6)
  if router.kind == "top_k":
    _check_choices(np.asarray(chosen_ME) > 0, router, biases)


def _check_choices(chosen_ME, router, biases):
  """Every token has its best 3 by (score + bias, score) in float64, but for ties that float32 rounds."""
  log_ME = log_scores_of(LOGITS_ME, router)
  biased_ME = np.exp(log_ME) + (0 if biases is None else np.asarray(biases))
  assert (chosen_ME.sum(axis=1) == 3).all()
  for m in range(M):
    allowed = range(E)
    if router.expert_groups > 1:
      allowed = {e for e in range(E) if chosen_ME[m, e // 2 * 2 : e // 2 * 2 + 2].any()}
      if len(allowed) < 4:  # three experts in two groups of two use both
        pytest.fail(f"token {m} has experts of one group")
      pairs = [(biased_ME[m, g : g + 2].sum(), np.logaddexp(*log_ME[m, g : g + 2]), g) for g in range(0, E, 2)]
      _check_best(pairs, {g for *_, g in pairs if g in allowed}, biases)
    _check_best([(biased_ME[m, e], log_ME[m, e], e) for e in allowed], set(np.flatnonzero(chosen_ME[m])), biases)


def _check_best(keys, chosen, biases):
  """`keys` are (score + bias, logarithm of the score, which), `chosen` those taken."""
  left = [key for key in keys if key[2] not in chosen]
  for taken in (key for key in keys if key[2] in chosen):
    for other in left:
      by_log = taken[1] >= other[1] - 1e-5
      near = abs(taken[0] - other[0]) < 1e-6
      assert by_log if biases is None else (taken[0] > other[0] or (near and (by_log or taken[0] != other[0])))


@pytest.mark.parametrize("scores", SCORES)
def test_probabilities_and_their_entropy_equal_float64_with_gradients(scores):
  router = Router(scores=scores)

  def of(logits_ME):
    probs_OUME = probabilities(logits_ME[None, None], router)
    # Each token is a sequence of its own.
    entropy_M = count_probabilities(probs_OUME, jnp.ones((1, 1, M), bool), 1)["entropy"][0]
    return jnp.sum(entropy_M * UP_ME[:, 0].astype(np.float32)), (probs_OUME[0, 0], entropy_M)

  (_, (probs_ME, entropy_M)), gradient_ME = jax.jit(jax.value_and_grad(of, has_aux=True))(LOGITS_ME)
  log_ME = log_scores_of(LOGITS_ME, router)
  log_ME = log_ME - np.logaddexp.reduce(log_ME, axis=1, keepdims=True)
  wanted_M = -(np.exp(log_ME) * log_ME).sum(axis=1)
  np.testing.assert_allclose(probs_ME, np.exp(log_ME), rtol=2e-4, atol=1e-6)
  np.testing.assert_allclose(entropy_M, wanted_M, rtol=1e-4, atol=1e-5)
  of_log_ME = -np.exp(log_ME) * (log_ME + wanted_M[:, None]) * UP_ME[:, :1]
  np.testing.assert_allclose(gradient_ME, slope(of_log_ME, LOGITS_ME, router), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("size", [1.0, 200.0, 1e4])
def test_every_loss_and_statistic_and_their_gradients_are_finite(scores, size):
  router = Router(scores=scores)
  valid_OUM = jnp.ones((1, 1, M), bool)

  def of(logits_ME):
    logits_OUME = logits_ME[None, None]
    counted = count_probabilities(probabilities(logits_OUME, router), valid_OUM, M)
    counted |= count_choices(logits_OUME, routed(logits_ME, router, None, 2), valid_OUM, jnp.zeros((1, 1)), M)
    sums, counts = sum_counts(jax.tree.map(lambda x: x[None], counted), M, M), token_counts(valid_OUM[0], M)
    names = ("load_balance", "sequence_balance", "global_balance", "router_z", "mutual_information")
    found = auxiliary_losses(sums, counts, names)
    return sum(jnp.sum(loss_L) for loss_L in found.values()), (found, statistics(sums, counts))

  draws = np.random.default_rng(2).uniform(-size, size, (M, E)).astype(np.float32)
  for logits_ME in (draws, draws - size, np.full((M, E), -size, np.float32)):
    (_, found), gradient_ME = jax.jit(jax.value_and_grad(of, has_aux=True))(logits_ME)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert np.isfinite(gradient_ME).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_and_gradients_are_finite_for_every_finite_logit(name):
  biases, router = ROUTERS[name]
  largest = float(np.finfo(np.float32).max)
  extremes = np.random.default_rng(3).choice([-largest, -1e30, -1.0, 0.0, 1e-40, 5.0, 1e30, largest], (64, E))

  def output(logits_ME):
    routing = routed(logits_ME, router, biases, E if router.kind == "dense" else 3)
    return jnp.sum(routing.weights_OUME(E)[0, 0] * UP_ME[:64].astype(np.float32))

  value, gradient_ME = jax.jit(jax.value_and_grad(output))(extremes.astype(np.float32))
  assert np.isfinite(value) and np.isfinite(gradient_ME).all()
