"""The experts of sorted rows, by blocks on CPU and by grouped products elsewhere, against each expert by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import DATA_EXPERT_MODEL, Mesh
from moejax.config.remat import OF_EXPERTS
from moejax.models.activations import activate
from moejax.models.moe.experts import Weights
from moejax.models.moe.experts_on_cpu import feed_forward_on_cpu
from moejax.models.moe.grouped import NARROW, _by_grouped_products
from moejax.models.products import operand
from moejax.partitioning import make_partitioner

R, D, F = 300, 6, 10
# A large block has 128 rows here, and a small one 32.
SIZES = {
  "uneven": [20, 230, 40, 0],
  "all in the last": [0, 0, 0, 300],
  "large blocks that lack rows": [97, 3, 96, 104],
  "unused rows": [129, 0, 31, 90],
  "no rows": [0, 0, 0, 0],
}


@pytest.fixture(scope="module")
def paths():
  partitioner = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
  return {"blocks": feed_forward_on_cpu, "products": functools.partial(_by_grouped_products, partitioner=partitioner)}


def parameters(activation, biased, width=F):
  names = ("up", "down") if activation == "gelu" else ("gate", "up", "down")
  keys = iter(jax.random.split(jax.random.key(1), 6))
  shapes = {name: (4, width, D) if name == "down" else (4, D, width) for name in names}
  matrices = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
  biases = {name: jax.random.normal(next(keys), (4, shapes[name][2])) for name in names if biased}
  return matrices, biases


@functools.partial(jax.jit, static_argnames=("path", "activation", "gradients"))
def output_and_gradients(path, activation, gradients, rows_RD, sizes_E, matrices, biases, of_out_RD):
  """The gradients are those of the rows, the matrices and the biases."""

  def run(rows_RD, matrices, biases):
    operands = {name: operand(matrix, rows_RD.dtype, gradients) for name, matrix in matrices.items()}
    biases = {name: bias.astype(rows_RD.dtype) for name, bias in biases.items()}
    return path(rows_RD, sizes_E, Weights(operands, biases, activation))

  out_RD, pull_back = jax.vjp(run, rows_RD, matrices, biases)
  return out_RD, pull_back(of_out_RD)


@functools.partial(jax.jit, static_argnames="activation")
def expected(activation, rows_RD, sizes_E, matrices, biases, of_out_RD):
  """Every expert is applied to all rows, of which its own are taken, in float32."""
  ends_E = jnp.cumsum(sizes_E)

  def run(rows_RD, matrices, biases):
    out_RD = jnp.zeros((R, D))
    for e in range(4):

      def wide(name, x_RX, e=e):
        return x_RX @ matrices[name][e] + (biases[name][e][None] if name in biases else 0)

      hidden_RF = activate(activation, wide("gate", rows_RD) if "gate" in matrices else None, wide("up", rows_RD))
      own_R = (ends_E[e] - sizes_E[e] <= jnp.arange(R)) & (jnp.arange(R) < ends_E[e])
      out_RD = jnp.where(own_R[:, None], wide("down", hidden_RF), out_RD)
    return out_RD

  out_RD, pull_back = jax.vjp(run, rows_RD.astype(jnp.float32), matrices, biases)
  return out_RD, pull_back(of_out_RD.astype(jnp.float32))


def check(path, activation, sizes, biased, dtype="float32", gradients="float32", width=F):
  matrices, biases = parameters(activation, biased, width)
  matrices, biases = (jax.tree.map(lambda a: a.astype(dtype).astype(jnp.float32), t) for t in (matrices, biases))
  rows_RD, of_out_RD = (jax.random.normal(jax.random.key(seed), (R, D), dtype) for seed in (2, 3))
  right = expected(activation, rows_RD, jnp.array(sizes), matrices, biases, of_out_RD)
  unused = slice(sum(sizes), R)  # must not leave their places, even backwards
  rows_RD, of_out_RD = rows_RD.at[unused].set(jnp.nan), of_out_RD.at[unused].set(jnp.nan)
  found = output_and_gradients(path, activation, gradients, rows_RD, jnp.array(sizes), matrices, biases, of_out_RD)
  assert found[0].dtype == rows_RD.dtype
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
    # bfloat16 rounds the saved products and the results to 8 bits; a gradient sums up to 300 of them.
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("path", ["blocks", "products"])
def test_each_expert_is_applied_to_its_rows_and_has_the_gradients_of_them(paths, path, case):
  check(paths[path], "swiglu", SIZES[case], biased=True)


@pytest.mark.parametrize("path", ["blocks", "products"])
@pytest.mark.parametrize("activation, biased", [("gelu", False), ("gelu", True), ("swiglu_clipped", True)])
def test_activations_with_and_without_gate_and_biases(paths, path, activation, biased):
  check(paths[path], activation, SIZES["uneven"], biased)


def test_wide_experts_have_separate_products_of_gate_and_up(paths):
  check(paths["products"], "swiglu", SIZES["uneven"], biased=True, width=NARROW)


@pytest.mark.parametrize("path", ["blocks", "products"])
@pytest.mark.parametrize("gradients", ["float32", "compute"])
def test_bfloat16_with_gradients_of_weights_in_either_type(paths, path, gradients):
  check(paths[path], "swiglu", SIZES["uneven"], biased=False, dtype="bfloat16", gradients=gradients)


def test_a_rematerialized_layer_does_not_compute_its_products_again():
  matrices, _ = parameters("swiglu", biased=False)
  sizes_E = jnp.array(SIZES["uneven"])

  def loss(policy, rows_RD, matrices):
    def layer(rows_RD, matrices):
      weights = Weights({name: operand(w, rows_RD.dtype, "compute") for name, w in matrices.items()}, {}, "swiglu")
      return jnp.sum(feed_forward_on_cpu(rows_RD, sizes_E, weights) ** 2)

    return jax.checkpoint(layer, policy=policy)(rows_RD, matrices) if policy else layer(rows_RD, matrices)

  def products(policy):
    gradient = jax.grad(functools.partial(loss, policy), argnums=(0, 1))
    return str(jax.make_jaxpr(gradient)(jnp.ones((R, D)), matrices)).count("dot_general[")

  saved, nothing = (jax.checkpoint_policies.save_only_these_names(*names) for names in (OF_EXPERTS, ()))
  assert products(saved) == products(None)
  assert products(nothing) > products(None)
