"""Biases and activations of experts: every dispatch against plain loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import DATA_EXPERT_MODEL, DenseRouter, Mesh, Model, MoE
from moejax.models.moe.layer import MoELayer
from moejax.partitioning import make_partitioner

E, A, D, F, B, T = 4, 2, 6, 8, 2, 24  # 48 tokens: more than are visited one by one
MODEL = Model(num_layers=2, d_model=D, num_heads=2, num_kv_heads=1, head_dim=2, d_ff=8, vocab_size=30)
RANDOM = np.random.default_rng(0)
X_BTD = RANDOM.normal(size=(B, T, D)).astype(np.float32)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


HIDDEN = {
  "swiglu": lambda gate, up: gate * sigmoid(gate) * up,
  "geglu": lambda gate, up: gelu(gate) * up,
  "gelu": lambda gate, up: gelu(up),
  "swiglu_clipped": lambda gate, up: (
    (np.clip(up, -7, 7) + 1) * np.minimum(gate, 7) * sigmoid(1.702 * np.minimum(gate, 7))
  ),
}


def layer_of(activation, moe):
  model = dataclasses.replace(MODEL, activation=activation, moe=moe)
  partitioner = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
  graph, state = nnx.split(nnx.eval_shape(lambda: MoELayer(model, partitioner, nnx.Rngs(params=0))))
  random = np.random.default_rng(1)
  drawn = jax.tree.map(
    lambda leaf: jnp.asarray(2 * random.normal(size=leaf.shape), jnp.float32), nnx.to_pure_dict(state)
  )
  return graph, drawn


def expected(activation, drawn, choices):
  """Loops over tokens and their best experts, whose weights are a softmax over them."""
  held = jax.tree.map(np.asarray, drawn)
  experts, out = held["experts"], np.zeros((B * T, D))
  for m, x in enumerate(X_BTD.reshape(-1, D)):
    logits = x @ held["w_router_DE"] + held["b_router_E"]
    best = np.argsort(-logits)[:choices]
    weights = np.exp(logits[best] - logits[best].max())
    for e, weight in zip(best, weights / weights.sum(), strict=True):
      gate = None if activation == "gelu" else x @ experts["w_gate_EDF"][e] + experts["b_gate_EF"][e]
      hidden = HIDDEN[activation](gate, x @ experts["w_up_EDF"][e] + experts["b_up_EF"][e])
      out[m] += weight * (hidden @ experts["w_down_EFD"][e] + experts["b_down_ED"][e])
  return out.reshape(B, T, D)


@pytest.mark.parametrize("activation", HIDDEN)
@pytest.mark.parametrize("dispatch", ["grouped", "grouped, few tokens", "einsum", "dense", "dense, few tokens"])
def test_a_layer_with_biases_equals_loops(activation, dispatch):
  dense, few = dispatch.startswith("dense"), dispatch.endswith("few tokens")
  if dense:
    moe = MoE(num_experts=E, experts_per_token=E, d_ff=F, bias=True, router=DenseRouter(), dispatch="dense")
  elif dispatch == "einsum":
    moe = MoE(num_experts=E, experts_per_token=A, d_ff=F, bias=True, capacity_factor=E / A)
  else:
    moe = MoE(num_experts=E, experts_per_token=A, d_ff=F, bias=True, dispatch="grouped")
  graph, drawn = layer_of(activation, moe)
  x_BTD = X_BTD[:, :8] if few else X_BTD
  run = jax.jit(lambda drawn, x_BTD: nnx.merge(graph, drawn)(x_BTD, jnp.ones(x_BTD.shape[:2], bool))[0])
  wanted = expected(activation, drawn, E if dense else A)[:, : x_BTD.shape[1]]
  np.testing.assert_allclose(run(drawn, x_BTD), wanted, rtol=2e-4, atol=2e-3)
