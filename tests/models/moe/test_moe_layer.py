"""The whole sparse layer, every router with every dispatch, against loops over tokens, and its invariances."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from moe_reference import expert, moe_reference

from moejax.config import (
  DATA_EXPERT_MODEL,
  DenseRouter,
  EinsumDispatch,
  ExpertChoiceRouter,
  Mesh,
  Model,
  MoE,
  Router,
  ThresholdRouter,
  TopPRouter,
)
from moejax.models.moe.layer import MoELayer
from moejax.partitioning import make_partitioner

MODEL = Model(num_layers=1, d_model=12, num_heads=2, num_kv_heads=2, head_dim=6, d_ff=8, vocab_size=16)

ROUTERS = {
  "switch": (1, Router(renormalize=False)),
  "top_k": (3, Router()),
  "top_k_of_probabilities": (2, Router(renormalize=False, scale=1.5)),
  "sigmoid": (2, Router(scores="sigmoid", scale=2.5)),
  "biased": (2, Router(scores="sigmoid", bias_rate=0.001)),
  "groups": (2, Router(expert_groups=4, groups_per_token=2)),
  "skipping": (3, Router(skip_below=0.5)),
  "top_p": (4, TopPRouter(threshold=0.55, renormalize=False)),
  "expert_choice": (2, ExpertChoiceRouter()),
  "dense": (8, DenseRouter()),
  "threshold": (8, ThresholdRouter()),
}
DISPATCHES = {
  "einsum, half": {"dispatch": "einsum", "capacity_factor": 0.5},
  "einsum, by token": {"dispatch": EinsumDispatch(priority="token"), "capacity_factor": 0.75},
  "einsum, room for all": {"dispatch": "einsum", "capacity_factor": 8.0},
  "grouped": {"dispatch": "grouped"},
  "dense": {"dispatch": "dense"},
}


def make_layer(activation="swiglu", dtype="float32", **fields):
  moe = MoE(**{"num_experts": 8, "experts_per_token": 2, "d_ff": 10, "group_size": 8} | fields)
  partitioner = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
  model = dataclasses.replace(MODEL, moe=moe, activation=activation, compute_dtype=dtype)
  layer = MoELayer(model, partitioner, nnx.Rngs(params=0))
  layer.w_router_DE[...] = 3.0 * layer.w_router_DE[...]  # far from ties
  if layer.bias_E is not None:
    layer.bias_E[...] = jnp.linspace(-0.3, 0.3, moe.num_experts)
  return layer


def inputs(seed=1):
  x_BTD = jax.random.normal(jax.random.key(seed), (3, 16, 12))
  return x_BTD, jnp.ones((3, 16), bool).at[1, 10:].set(False).at[2, 3].set(False)


def reference(parameters, x_BTD, valid_BT, layer):
  """out_BTD and the dropped part, in float64."""
  weights = jax.tree.map(lambda w: np.asarray(w, np.float64), parameters)
  experts = weights["experts"]
  out, dropped = moe_reference(
    np.asarray(x_BTD, np.float64).reshape(-1, 8, 12), np.asarray(valid_BT).reshape(-1, 8), weights["w_router_DE"],
    experts.get("w_gate_EDF"), experts["w_up_EDF"], experts["w_down_EFD"], layer.moe, weights.get("bias_E"),
  )  # fmt: skip
  return out.reshape(x_BTD.shape), dropped


@nnx.jit
def run(layer, *arguments):
  """The layer as one program: run eagerly, each of its operations would be compiled on its own."""
  return layer(*arguments)


def split(layer):
  graph, state = nnx.split(layer)
  return graph, nnx.to_pure_dict(state)


@pytest.mark.parametrize(
  ("router", "dispatch", "activation"),
  [(router, "einsum, half", "swiglu") for router in ROUTERS]
  + [("top_k", "einsum, room for all", "swiglu")]
  + [("top_k", dispatch, "gelu") for dispatch in ("einsum, half", "grouped", "dense")],
)
def test_every_router_with_a_capacity_equals_a_loop_over_tokens(router, dispatch, activation):
  A, config = ROUTERS[router]
  fields = DISPATCHES[dispatch]
  if config.kind == "expert_choice" and "einsum" in dispatch:
    fields = fields | {"capacity_factor": 1.0}  # its own capacity, which is never exceeded
  layer = make_layer(activation, experts_per_token=A, router=config, **fields)
  x_BTD, valid_BT = inputs()
  graph, parameters = split(layer)
  out_BTD, counted = jax.jit(lambda *arguments: nnx.merge(graph, parameters)(*arguments))(x_BTD, valid_BT)
  expected, dropped = reference(parameters, x_BTD, valid_BT, layer)
  np.testing.assert_allclose(out_BTD, expected, atol=3e-5)
  assert np.abs(expected).max() > 0.1
  assert float(counted["dropped"].sum() / counted["choices"].sum()) == pytest.approx(dropped, abs=1e-6)
  if dispatch == "einsum, half" and config.kind in ("top_k", "top_p"):
    assert dropped > 0.1


@pytest.mark.parametrize(
  "dispatch",
  ["grouped", *(pytest.param(dispatch, marks=pytest.mark.slow) for dispatch in ("einsum, by token", "dense"))],
)
@pytest.mark.parametrize("router", ROUTERS)
def test_outputs_of_every_router_with_every_dispatch_equal_a_loop_and_gradients_its_finite_differences(
  router, dispatch
):
  A, config = ROUTERS[router]
  fields = DISPATCHES[dispatch] | (
    {"capacity_factor": 1.0} if config.kind == "expert_choice" and "einsum" in dispatch else {}
  )
  check_against_loop(make_layer(experts_per_token=A, router=config, **fields))


def check_against_loop(layer):
  """Output, dropped choices and the gradient along one direction."""
  x_BTD, valid_BT = inputs()
  graph, parameters = split(layer)
  direction = jax.tree.map(lambda w: jax.random.normal(jax.random.key(w.size), w.shape), (parameters, x_BTD))
  if "bias_E" in parameters:  # decides, and has no gradient
    direction[0]["bias_E"] = jnp.zeros(8)

  def loop(step):
    moved, x = jax.tree.map(
      lambda w, d: np.asarray(w, np.float64) + step * np.asarray(d, np.float64), (parameters, x_BTD), direction
    )
    return np.sum(reference(moved, x, valid_BT, layer)[0] ** 2)

  def fast(parameters, x_BTD):
    out_BTD, counted = nnx.merge(graph, parameters)(x_BTD, valid_BT)
    return jnp.sum(jnp.square(out_BTD)), (out_BTD, counted)

  gradient, (out_BTD, counted) = jax.jit(jax.grad(fast, argnums=(0, 1), has_aux=True))(parameters, x_BTD)
  expected, dropped = reference(parameters, x_BTD, valid_BT, layer)
  np.testing.assert_allclose(out_BTD, expected, atol=3e-5)
  assert np.abs(expected).max() > 0.1
  assert float(counted["dropped"].sum() / counted["choices"].sum()) == pytest.approx(dropped, abs=1e-6)
  slope = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
  # A step small enough that no token changes its experts.
  assert slope == pytest.approx((loop(1e-7) - loop(-1e-7)) / 2e-7, rel=1e-3)


@pytest.mark.parametrize(
  "dispatch", ["grouped", *(pytest.param(dispatch, marks=pytest.mark.slow) for dispatch in ("einsum, half", "dense"))]
)
def test_weights_on_inputs_equal_a_loop_and_their_gradients_its_finite_differences(dispatch):
  router = Router(scores="sigmoid", renormalize=False, scale=1.5)
  check_against_loop(make_layer(experts_per_token=1, router=router, weights_on="inputs", **DISPATCHES[dispatch]))


@pytest.mark.parametrize("dispatch", ["einsum, room for all", "grouped", "dense"])
def test_bfloat16_differs_by_its_rounding_alone(dispatch):
  layer = make_layer(experts_per_token=2, **DISPATCHES[dispatch])
  x_BTD, valid_BT = inputs()
  exact, _ = run(layer, x_BTD.astype(jnp.bfloat16).astype(jnp.float32), valid_BT)
  rounded, counted = run(layer, x_BTD.astype(jnp.bfloat16), valid_BT)
  assert rounded.dtype == jnp.bfloat16
  assert {value.dtype for value in jax.tree.leaves(counted)} == {jnp.dtype("float32")}
  # Three roundings to 8 bits on values of order 1.
  np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_permuting_experts_with_their_router_columns_changes_nothing(dispatch):
  layer = make_layer(**DISPATCHES[dispatch])
  before, _ = run(layer, *inputs())
  order = np.array([2, 0, 3, 1, 7, 6, 4, 5])
  layer.w_router_DE[...] = layer.w_router_DE[...][:, order]
  for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"):
    weight = getattr(layer.experts, name)
    weight[...] = weight[...][order]
  after, _ = run(layer, *inputs())
  np.testing.assert_allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("dispatch", ["einsum", "grouped", "dense"])
def test_all_experts_for_every_token_is_the_dense_mixture(dispatch):
  layer = make_layer(experts_per_token=8, dispatch=dispatch)
  x_BTD, _ = inputs()
  out_BTD, _ = run(layer, x_BTD, jnp.ones((3, 16), bool))
  experts = layer.experts
  gate, up, down = (np.asarray(w[...]) for w in (experts.w_gate_EDF, experts.w_up_EDF, experts.w_down_EFD))
  probs = np.asarray(jax.nn.softmax(x_BTD @ layer.w_router_DE[...], axis=-1))
  mixture = sum(probs[..., e, None] * expert(np.asarray(x_BTD), gate[e], up[e], down[e]) for e in range(8))
  np.testing.assert_allclose(out_BTD, mixture, atol=3e-5)


def test_shared_experts_see_every_token_beside_its_own_experts():
  alone, both = make_layer(), make_layer(num_shared_experts=2)
  assert both.shared is not None and both.shared.w_up_DF.shape == (12, 20)
  _, of_alone = split(alone)
  nnx.update(both, nnx.State(of_alone))
  x_BTD, valid_BT = inputs()
  np.testing.assert_allclose(
    run(both, x_BTD, valid_BT)[0], run(alone, x_BTD, valid_BT)[0] + both.shared(x_BTD), atol=1e-6
  )


def test_a_gate_weights_what_the_shared_experts_add_to_each_token():
  alone, gated = make_layer(), make_layer(num_shared_experts=2, shared_gate=True)
  _, of_alone = split(alone)
  nnx.update(gated, nnx.State(of_alone))
  x_BTD, valid_BT = inputs()
  weight_BT1 = jax.nn.sigmoid(jnp.einsum("BTD,DX->BTX", x_BTD, gated.w_shared_gate_D1[...]))
  assert np.ptp(weight_BT1) > 0.1
  expected = run(alone, x_BTD, valid_BT)[0] + weight_BT1 * gated.shared(x_BTD)
  np.testing.assert_allclose(run(gated, x_BTD, valid_BT)[0], expected, atol=1e-6)


@pytest.mark.parametrize("dispatch", ["einsum", "grouped", "dense"])
def test_a_router_with_a_planted_preference_is_followed(dispatch):
  layer = make_layer(experts_per_token=1, router=Router(renormalize=False), dispatch=dispatch)
  layer.w_router_DE[...] = jnp.zeros((12, 8)).at[:, 3].set(1.0)
  x_BTD, valid_BT = inputs()
  _, counted = run(layer, jnp.abs(x_BTD), valid_BT)
  load_E = counted["choices"].sum(axis=(0, 1)) / counted["choices"].sum()
  np.testing.assert_allclose(load_E, np.eye(8)[3], rtol=1e-6)


@pytest.mark.parametrize("dispatch", ["einsum", "grouped", "dense"])
def test_what_padded_tokens_hold_changes_nothing(dispatch):
  layer = make_layer(dispatch=dispatch)
  x_BTD, valid_BT = inputs()
  junk = jnp.where(valid_BT[..., None], x_BTD, 1e3)
  (one, of_one), (other, of_other) = run(layer, x_BTD, valid_BT), run(layer, junk, valid_BT)
  np.testing.assert_allclose(one[valid_BT], other[valid_BT], atol=1e-6)
  assert not np.asarray(other[~valid_BT]).any()
  for mine, theirs in zip(jax.tree.leaves(of_one), jax.tree.leaves(of_other), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_noise_needs_a_key_and_another_key_is_other_noise():
  quiet = make_layer()
  for router in (Router(jitter=0.3), Router(gumbel=1.0)):
    layer = make_layer(router=router)
    x_BTD, valid_BT = inputs()
    np.testing.assert_array_equal(run(layer, x_BTD, valid_BT)[0], run(quiet, x_BTD, valid_BT)[0])
    with_noise = [run(layer, x_BTD, valid_BT, jax.random.split(jax.random.key(seed), 3))[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(with_noise[0], with_noise[1])
    assert np.abs(with_noise[0] - with_noise[2]).max() > 1e-3
    assert np.abs(with_noise[0] - run(quiet, x_BTD, valid_BT)[0]).max() > 1e-3
