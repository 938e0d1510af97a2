"""Attention whose experts are groups of query heads (MoA), against the paper's equations in loops."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import DATA_EXPERT_MODEL, GroupedQuery, Mesh, Model
from moejax.config.attention import Rotary
from moejax.experiments.sparse_families import gpt_oss_20b
from moejax.models.attend import Context, context_of
from moejax.models.attention import GroupedQueryLayer
from moejax.models.moe.losses import mutual_information_loss
from moejax.models.moe.router_counts import sum_counts, token_counts
from moejax.models.rotary import rotary_angles, rotate
from moejax.partitioning import Partitioner, make_partitioner

# Three experts of two heads each, which share two heads of keys and values.
MODEL = Model(
  num_layers=1, d_model=10, num_heads=6, num_kv_heads=2, head_dim=4, d_ff=8, vocab_size=16, attention_experts=3
)
B, T = 2, 7
ROTARY = Rotary(4, MODEL.rope_theta)


def make(model=MODEL):
  partitioner = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
  return nnx.jit(lambda: GroupedQueryLayer(GroupedQuery(), model, partitioner, nnx.Rngs(params=0)))()


def inputs():
  positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
  x_BTD = jax.random.normal(jax.random.key(1), (B, T, 10))
  return x_BTD, Context(jnp.ones((B, T), jnp.int32), positions_BT, {ROTARY: rotary_angles(positions_BT, *ROTARY)})


@pytest.mark.slow
def test_the_output_is_the_weighted_sum_of_every_experts_heads():
  layer = make()
  layer.w_router_DE[...] = 3.0 * layer.w_router_DE[...]
  x_BTD, context = inputs()
  angles = context.angles[ROTARY]
  out_BTD, *_ = nnx.jit(lambda layer, x_BTD: layer(x_BTD, context))(layer, x_BTD)
  expected_BTD, weights_BTE = nnx.jit(weighted_sum)(layer, x_BTD, angles)
  np.testing.assert_allclose(out_BTD, expected_BTD, atol=1e-5)
  assert float(jnp.std(weights_BTE)) > 0.1


def weighted_sum(layer, x_BTD, angles):
  """The output of the layer and the weights of its experts."""
  k_BTKH, v_BTKH = (jnp.einsum("BTD,DKH->BTKH", x_BTD, w[...]) for w in (layer.w_k_DKH, layer.w_v_DKH))
  k_BTKH = rotate(k_BTKH, angles)
  weights_BTE = jax.nn.softmax(x_BTD @ layer.w_router_DE[...], axis=-1)
  expected_BTD = jnp.zeros_like(x_BTD)
  for e in range(3):  # equation 8, and within it equation 7
    for k in range(2):
      head = k * 3 + e
      q_BTH = rotate((x_BTD @ layer.w_q_DNH[:, head])[:, :, None], angles)[:, :, 0]
      logits_BTS = jnp.einsum("BTH,BSH->BTS", q_BTH, k_BTKH[:, :, k]) / 2.0
      logits_BTS = jnp.where(jnp.tril(jnp.ones((T, T), bool))[None], logits_BTS, -jnp.inf)
      seen_BTH = jnp.einsum("BTS,BSH->BTH", jax.nn.softmax(logits_BTS, axis=-1), v_BTKH[:, :, k])
      expected_BTD += weights_BTE[..., e, None] * (seen_BTH @ layer.w_out_NHD[head])
  return expected_BTD, weights_BTE


def test_the_products_that_tpu_takes_give_the_same_output_and_gradients(monkeypatch):
  graph, state = nnx.split(make())
  x_BTD, context = inputs()

  def squared(state, x_BTD):
    return jnp.sum(jnp.square(nnx.merge(graph, state)(x_BTD, context)[0]))

  def value_and_gradients():
    return jax.jit(lambda *arguments: jax.value_and_grad(squared, (0, 1))(*arguments))(state, x_BTD)

  expected = value_and_gradients()
  monkeypatch.setattr(Partitioner, "platform", "tpu")
  chex.assert_trees_all_close(value_and_gradients(), expected, atol=1e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_the_layers_of_gpt_oss_have_the_fused_kernel_on_tpu(monkeypatch, index):
  monkeypatch.setattr(Partitioner, "platform", "tpu")
  model = gpt_oss_20b().model
  config, partitioner = model.attention[index], make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
  graph, state = nnx.split(nnx.eval_shape(lambda: GroupedQueryLayer(config, model, partitioner, nnx.Rngs(params=0))))

  def layer(state, x_BTD, segments_BT, positions_BT):
    return nnx.merge(graph, state)(x_BTD, context_of(model, segments_BT, positions_BT))[0]

  numbers_BT = jax.ShapeDtypeStruct((1, 256), jnp.int32)
  x_BTD = jax.ShapeDtypeStruct((1, 256, model.d_model), jnp.bfloat16)
  assert config.sinks and "splash_mha_fwd" in str(jax.make_jaxpr(layer)(state, x_BTD, numbers_BT, numbers_BT))


def test_its_mutual_information_reaches_its_router_and_no_other_weight():
  layer = make()
  graph, state = nnx.split(layer)

  x_BTD, context = inputs()
  T = x_BTD.shape[1]

  def loss(parameters):
    of_layers = jax.tree.map(lambda x: x[None], nnx.merge(graph, parameters)(x_BTD, context)[1])
    sums, tokens = sum_counts(of_layers, T, T), token_counts(context.segments_BT > 0, T).tokens
    return mutual_information_loss(sums["entropy"] / tokens, sums["probs"] / tokens)[0]

  gradients = jax.jit(jax.grad(loss))(nnx.to_pure_dict(state))
  assert float(jnp.abs(gradients.pop("w_router_DE")).max()) > 1e-4
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


def test_without_experts_there_is_no_router_and_nothing_to_report():
  layer = make(dataclasses.replace(MODEL, attention_experts=None))
  assert layer.w_router_DE is None
  x_BTD, context = inputs()
  assert nnx.eval_shape(lambda layer: layer(x_BTD, context), layer)[1] is None


RULES = {
  "as they are": {},
  "key/value heads whole": {"kv_heads": ()},
  "query heads whole": {"heads": ()},
  "query heads over two axes": {"heads": ("expert", "model"), "batch": ("data",), "embed": ("data",)},
  "key/value heads elsewhere": {"heads": ("model",), "kv_heads": ("expert",), "batch": ("data",), "embed": ("data",)},
  "width of a head": {"heads": (), "kv_heads": (), "head_dim": ("model",)},
  "width of a head over the batch's axis": {"head_dim": ("data",), "embed": ()},
}


FOUR, TWO = Mesh(data=2, model=4), Mesh(data=2, expert=2, model=2)


@pytest.mark.parametrize(
  ("heads", "mesh", "tables"),
  [
    ((8, 2), FOUR, tuple(RULES)),
    pytest.param((8, 2), TWO, tuple(RULES), marks=pytest.mark.slow),
    # A device's three query heads have two key/value heads, one of them with others.
    pytest.param((12, 6), FOUR, tuple(RULES), marks=pytest.mark.slow),
    *(
      pytest.param(heads, mesh, tuple(RULES)[:2], marks=pytest.mark.slow)
      for heads, mesh in (((8, 8), FOUR), ((8, 4), FOUR), ((4, 1), FOUR), ((12, 4), FOUR), ((12, 3), TWO))
    ),
  ],
  ids=str,
)
def test_every_query_head_attends_to_its_own_key_value_head_whatever_the_rules_shard(heads, mesh, tables):
  model = dataclasses.replace(MODEL, d_model=16, num_heads=heads[0], num_kv_heads=heads[1], attention_experts=None)
  x_BTD = jax.random.normal(jax.random.key(1), (4, T, 16))
  positions_BT = jnp.broadcast_to(jnp.arange(T), (4, T))
  context = Context(jnp.ones((4, T), jnp.int32), positions_BT, {ROTARY: rotary_angles(positions_BT, *ROTARY)})
  parameters = nnx.to_pure_dict(nnx.split(make(model))[1])

  def output_and_gradients(mesh, rules=()):
    partitioner = make_partitioner(mesh, (*DATA_EXPERT_MODEL, *rules))
    graph = nnx.split(
      nnx.eval_shape(lambda: GroupedQueryLayer(GroupedQuery(), model, partitioner, nnx.Rngs(params=0)))
    )[0]

    def loss(parameters, x_BTD):
      out_BTD = nnx.merge(graph, parameters)(x_BTD, context)[0]
      return jnp.sum(jnp.sin(out_BTD)), out_BTD

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(parameters, x_BTD)

  expected = output_and_gradients(Mesh(data=1))
  for table in tables:
    found = output_and_gradients(mesh, RULES[table].items())
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=2e-5, custom_message=table)
