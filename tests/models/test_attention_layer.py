"""Attention whose experts are groups of query heads (MoA), against the paper's equations in loops."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.config import DATA_EXPERT_MODEL, Mesh, Model
from moejax.models.attention import Attention
from moejax.models.layers import Context, rotary_angles, rotate
from moejax.models.moe.balance import add_up, count_batch, mutual_information_loss
from moejax.partitioning import Partitioner, make_partitioner

# Three experts of two heads each, which share two heads of keys and values.
MODEL = Model(
  num_layers=1, d_model=10, num_heads=6, num_kv_heads=2, head_dim=4, d_ff=8, vocab_size=16, attention_experts=3
)
B, T = 2, 7


def make(model=MODEL):
  partitioner = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
  return Attention(model, partitioner, nnx.Rngs(params=0))


def inputs():
  positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
  x_BTD = jax.random.normal(jax.random.key(1), (B, T, 10))
  return x_BTD, Context(jnp.ones((B, T), jnp.int32), positions_BT, rotary_angles(positions_BT, 4, MODEL.rope_theta))


def test_the_output_is_the_weighted_sum_of_every_experts_heads():
  layer = make()
  layer.w_router_DE[...] = 3.0 * layer.w_router_DE[...]
  x_BTD, context = inputs()
  angles = context.angles
  out_BTD, *_ = nnx.jit(lambda layer, x_BTD: layer(x_BTD, context))(layer, x_BTD)
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
  np.testing.assert_allclose(out_BTD, expected_BTD, atol=1e-5)
  assert float(jnp.std(weights_BTE)) > 0.1


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


def test_its_mutual_information_reaches_its_router_and_no_other_weight():
  layer = make()
  graph, state = nnx.split(layer)

  x_BTD, context = inputs()
  T = x_BTD.shape[1]

  def loss(parameters):
    of_layers = jax.tree.map(lambda x: x[None], nnx.merge(graph, parameters)(x_BTD, context)[1])
    return mutual_information_loss(add_up(of_layers, T, T), count_batch(context.segments_BT > 0, T))[0]

  gradients = jax.jit(jax.grad(loss))(nnx.to_pure_dict(state))
  assert float(jnp.abs(gradients.pop("w_router_DE")).max()) > 1e-4
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


def test_without_experts_there_is_no_router_and_nothing_to_report():
  layer = make(dataclasses.replace(MODEL, attention_experts=None))
  assert layer.w_router_DE is None
  assert layer(*inputs())[1] is None
