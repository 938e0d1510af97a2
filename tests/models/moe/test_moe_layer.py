"""The whole sparse layer against a loop over tokens, and its invariances."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from moe_reference import expert, moe_reference

from moejax.config import DATA_EXPERT_MODEL, Mesh, Model, MoE
from moejax.models.moe.layer import MoELayer
from moejax.partitioning import make_partitioner

MODEL = Model(num_layers=1, d_model=12, num_heads=2, num_kv_heads=2, head_dim=6, d_ff=8, vocab_size=16)


def make_layer(**fields):
  moe = MoE(**{"num_experts": 4, "experts_per_token": 2, "d_ff": 10, "group_size": 8} | fields)
  partitioner = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
  return MoELayer(dataclasses.replace(MODEL, moe=moe), partitioner, nnx.Rngs(params=0))


def inputs(seed=1):
  return jax.random.normal(jax.random.key(seed), (3, 16, 12)), jnp.ones((3, 16), bool)


def weights(layer):
  experts = layer.experts
  return [np.asarray(w[...]) for w in (layer.w_router_DE, experts.w_gate_EDF, experts.w_up_EDF, experts.w_down_EFD)]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("num_experts", "experts_per_token"), [(2, 1), (4, 2), (8, 3)])
def test_layer_equals_a_loop_over_tokens(num_experts, experts_per_token, capacity_factor, renormalize):
  layer = make_layer(
    num_experts=num_experts,
    experts_per_token=experts_per_token,
    capacity_factor=capacity_factor,
    renormalize=renormalize,
  )
  x_BTD, valid_BT = inputs()
  valid_BT = valid_BT.at[1, 10:].set(False)
  out_BTD, auxiliary = layer(x_BTD, valid_BT)
  groups = np.asarray(x_BTD, np.float64).reshape(-1, 8, 12)
  expected, dropped = moe_reference(
    groups,
    np.asarray(valid_BT).reshape(-1, 8),
    *weights(layer),
    experts_per_token,
    layer.moe.capacity,
    renormalize,
  )
  np.testing.assert_allclose(out_BTD, expected.reshape(x_BTD.shape), atol=2e-5)
  choices = int(valid_BT.sum()) * experts_per_token
  assert float(auxiliary["statistics"]["dropped_fraction"]) == pytest.approx(dropped / choices, abs=1e-6)


def test_gradients_equal_finite_differences_of_the_loop():
  layer = make_layer(capacity_factor=0.75)
  x_BTD, valid_BT = inputs()
  graph, state = nnx.split(layer)
  parameters = nnx.to_pure_dict(state)
  direction = jax.tree.map(lambda w: jax.random.normal(jax.random.key(w.size), w.shape), parameters)

  def loop(step):
    moved = jax.tree.map(
      lambda w, d: np.asarray(w, np.float64) + step * np.asarray(d, np.float64), parameters, direction
    )
    experts = moved["experts"]
    out, _ = moe_reference(
      np.asarray(x_BTD, np.float64).reshape(-1, 8, 12), np.ones((6, 8), bool), moved["w_router_DE"],
      experts["w_gate_EDF"], experts["w_up_EDF"], experts["w_down_EFD"], 2, layer.moe.capacity, True,
    )  # fmt: skip
    return np.sum(out**2)

  def fast(parameters):
    return jnp.sum(jnp.square(nnx.merge(graph, parameters)(x_BTD, valid_BT)[0]))

  _, slope = jax.jvp(fast, (parameters,), (direction,))
  # A step small enough that no token changes its experts.
  assert float(slope) == pytest.approx((loop(1e-7) - loop(-1e-7)) / 2e-7, rel=1e-3)


def test_permuting_experts_with_their_router_columns_changes_nothing():
  layer = make_layer(capacity_factor=0.75)
  before, _ = layer(*inputs())
  order = np.array([2, 0, 3, 1])
  layer.w_router_DE[...] = layer.w_router_DE[...][:, order]
  for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"):
    weight = getattr(layer.experts, name)
    weight[...] = weight[...][order]
  after, _ = layer(*inputs())
  np.testing.assert_allclose(before, after, atol=1e-5)


def test_all_experts_for_every_token_is_the_dense_mixture():
  layer = make_layer(experts_per_token=4, capacity_factor=1.0)
  x_BTD, valid_BT = inputs()
  out_BTD, _ = layer(x_BTD, valid_BT)
  router, gate, up, down = weights(layer)
  probs = np.asarray(jax.nn.softmax(x_BTD @ router, axis=-1))
  mixture = sum(probs[..., e, None] * expert(np.asarray(x_BTD), gate[e], up[e], down[e]) for e in range(4))
  np.testing.assert_allclose(out_BTD, mixture, atol=2e-5)


def test_a_router_with_a_planted_preference_is_followed():
  layer = make_layer(experts_per_token=1, capacity_factor=4.0)
  layer.w_router_DE[...] = jnp.zeros((12, 4)).at[:, 3].set(1.0)
  x_BTD, valid_BT = inputs()
  _, auxiliary = layer(jnp.abs(x_BTD), valid_BT)
  np.testing.assert_array_equal(auxiliary["statistics"]["load"], [0.0, 0.0, 0.0, 1.0])
