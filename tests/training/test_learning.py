"""Routers learn: balance where a loss or a bias asks for it, and which expert a token needs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training_fixtures import random_batch, spec_of, tiny

from moejax.config import DATA_EXPERT_MODEL, Losses, Mesh, Model, MoE, Router
from moejax.models.moe.layer import MoELayer
from moejax.partitioning import make_partitioner
from moejax.training.step import make_train_step

STEPS = 200


@functools.cache
def imbalance(router=None, **losses):
  """Largest over mean load, over the last 20 of 200 steps, on text whose commonest token is half of it."""
  experiment = tiny(True)
  moe = dataclasses.replace(experiment.model.moe, dispatch="grouped", router=router or Router())
  experiment = dataclasses.replace(
    experiment,
    model=dataclasses.replace(experiment.model, moe=moe),
    training=dataclasses.replace(experiment.training, losses=Losses(**losses)),
  )
  spec = spec_of(experiment)
  state, step = spec.init_state(0), make_train_step(spec)
  batches = [jax.device_put(_skewed(random_batch(experiment, seed), seed), spec.partitioner.batch) for seed in range(4)]
  largest = []
  for i in range(STEPS):
    state, metrics = step(state, batches[i % 4], jnp.float32(3e-3))
    largest.append(float(metrics["router/load"].max()))
  return 8 * float(np.mean(largest[-20:]))


def _skewed(batch, seed):
  tokens = np.minimum(np.random.default_rng(seed).geometric(0.5, batch["tokens"].shape), 12).astype(np.int32)
  return batch | {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["load_balance", "sequence_balance", "global_balance"])
def test_each_balance_loss_lowers_the_measured_imbalance(name):
  without, with_loss = imbalance(), imbalance(**{name: 0.1})
  assert without > 1.6, "nothing to balance"
  assert with_loss - 1 < 0.5 * (without - 1)


@pytest.mark.slow
def test_the_balancing_bias_lowers_the_measured_imbalance_without_a_loss():
  assert imbalance(Router(bias_rate=0.01)) - 1 < 0.5 * (imbalance() - 1)


@pytest.mark.parametrize(
  "dispatch", ["grouped", *(pytest.param(d, marks=pytest.mark.slow) for d in ("einsum", "dense"))]
)
def test_a_planted_preference_is_found(dispatch):
  moe = MoE(num_experts=4, experts_per_token=2, d_ff=16, group_size=64, dispatch=dispatch)
  model = Model(num_layers=1, d_model=8, num_heads=2, num_kv_heads=2, head_dim=4, d_ff=8, vocab_size=16, moe=moe)
  partitioner = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
  layer = nnx.jit(lambda: MoELayer(model, partitioner, nnx.Rngs(params=0)))()
  graph, state = nnx.split(layer)
  planted = nnx.to_pure_dict(state) | {"w_router_DE": jax.random.normal(jax.random.key(5), (8, 4))}
  x_BTD, valid_BT = jax.random.normal(jax.random.key(1), (8, 64, 8)), jnp.ones((8, 64), bool)

  @jax.jit
  def output(w_router_DE):
    return nnx.merge(graph, planted | {"w_router_DE": w_router_DE})(x_BTD, valid_BT)[0]

  target = output(planted["w_router_DE"])
  optimizer = optax.adam(0.05)

  @jax.jit
  def step(w_router_DE, moments):
    gradient = jax.grad(lambda w: 1e3 * jnp.mean(jnp.square(output(w) - target)))(w_router_DE)
    updates, moments = optimizer.update(gradient, moments)
    return w_router_DE + updates, moments

  w_router_DE, moments = 0.1 * jax.random.normal(jax.random.key(9), (8, 4)), None
  moments = optimizer.init(w_router_DE)

  def agreement():
    return float(np.mean(np.argmax(x_BTD @ w_router_DE, -1) == np.argmax(x_BTD @ planted["w_router_DE"], -1)))

  before = agreement()
  for _ in range(STEPS):
    w_router_DE, moments = step(w_router_DE, moments)
  assert before < 0.5 < 0.9 < agreement()
