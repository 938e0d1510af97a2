"""Gradients of weights in float32, whatever the type of activations, up to their sum over devices."""

import dataclasses
import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from training_fixtures import spec_of, tiny

from moejax.config import Mesh
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.models.products import look_up, operand, product
from moejax.training.step import abstract_inputs, make_train_step

CASES = {
  "dense": (False, {}),
  "einsum": (True, {"dispatch": "einsum"}),
  "grouped": (True, {"dispatch": "grouped", "num_shared_experts": 3}),
  "dense dispatch": (True, {"dispatch": "dense"}),
}


def draw(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def error(found, expected):
  return float(jnp.abs(found.astype(jnp.float32) - expected).max() / jnp.abs(expected).max())


@pytest.mark.parametrize(("gradients", "low", "high"), [("float32", 0.0, 1e-5), ("compute", 1e-4, 1e-2)])
def test_a_weights_gradient_is_rounded_only_where_it_is_asked_for(gradients, low, high):
  x_MD, of_out_MF = (draw(seed, 512, 16).astype(jnp.bfloat16) for seed in (0, 1))
  w_DF = draw(2, 16, 16)

  def out(x_MD, w_DF):
    return product("MD,DF->MF", x_MD, operand(w_DF, x_MD.dtype, gradients))

  def value_and_gradients(function):
    value, back = jax.vjp(function, x_MD, w_DF)
    return value, *back(of_out_MF)

  out_MF, of_x_MD, of_w_DF = jax.jit(lambda: value_and_gradients(out))()
  plain_MF, plain_of_x_MD, _ = jax.jit(lambda: value_and_gradients(lambda x, w: x @ w.astype(x.dtype)))()
  np.testing.assert_array_equal(out_MF, plain_MF)
  np.testing.assert_array_equal(of_x_MD, plain_of_x_MD)
  assert of_w_DF.dtype == jnp.float32
  assert low <= error(of_w_DF, x_MD.astype(jnp.float32).T @ of_out_MF.astype(jnp.float32)) <= high


@pytest.mark.parametrize("gradients", ["float32", "compute"])
def test_the_gradient_of_a_wider_result_is_rounded_only_where_it_is_asked_for(gradients):
  """Float32 logits of activations in bfloat16."""
  x_MD, of_out_MV, w_DV = draw(0, 64, 32).astype(jnp.bfloat16), draw(1, 64, 48), draw(2, 32, 48)
  kept_DV = w_DV.astype(jnp.bfloat16).astype(jnp.float32)

  def gradients_with(rounds):
    def out(x_MD, w_DV):
      held = operand(w_DV, x_MD.dtype, gradients)
      return product("MD,DV->MV", x_MD, held, result=jnp.float32, rounds_gradient=rounds)

    out_MV, back = jax.vjp(out, x_MD, w_DV)
    assert out_MV.dtype == jnp.float32
    return back(of_out_MV)

  for rounds, of_result_MV in ((False, of_out_MV), (True, of_out_MV.astype(jnp.bfloat16).astype(jnp.float32))):
    of_x_MD, of_w_DV = gradients_with(rounds)
    close = 1e-5 if gradients == "float32" else 1e-2
    assert of_x_MD.dtype == jnp.bfloat16 and error(of_x_MD, of_result_MV @ kept_DV.T) < 1e-2
    assert of_w_DV.dtype == jnp.float32 and error(of_w_DV, x_MD.astype(jnp.float32).T @ of_result_MV) < close


def test_float32_activations_take_the_plain_product():
  weight = operand(draw(0, 4, 4), jnp.float32, "float32")
  assert weight.wide is None


def test_gradients_of_a_row_that_is_looked_up_often_add_up_in_float32():
  rows = jnp.zeros(1000, jnp.int32)
  for gradients, expected in (("float32", 1000.0), ("compute", 256.0)):  # 256 + 1 is 256 in bfloat16

    def total(table_VD, gradients=gradients):
      return jnp.sum(look_up(operand(table_VD, jnp.bfloat16, gradients), rows).astype(jnp.float32))

    assert float(jax.grad(total)(jnp.ones((3, 1)))[0, 0]) == expected


def test_the_grouped_product_gives_its_gradient_to_the_wide_form():
  x_RD, w_EDF = draw(0, 24, 8).astype(jnp.bfloat16), draw(1, 3, 8, 16)
  sizes_E, of_out_RF = jnp.array([10, 0, 14]), draw(2, 24, 16).astype(jnp.bfloat16)

  def out(w_EDF):
    value = jax.lax.stop_gradient(w_EDF.astype(jnp.bfloat16))
    return grouped_matmul(x_RD, value, sizes_E, wide_EDF=w_EDF)

  of_w_EDF = jax.jit(lambda: jax.vjp(out, w_EDF)[1](of_out_RF)[0])()
  rows = [slice(0, 10), slice(10, 10), slice(10, 24)]
  expected = jnp.stack([x_RD[part].astype(jnp.float32).T @ of_out_RF[part].astype(jnp.float32) for part in rows])
  assert of_w_EDF.dtype == jnp.float32 and error(of_w_EDF, expected) < 1e-5


@functools.cache
def lowered(case, gradients, context=1):
  """The train step with activations in bfloat16, before any compiler, and its spec."""
  sparse, fields = CASES[case]
  base = tiny(sparse, mesh=Mesh(data=2, expert=2 // context, context=context, model=2))
  moe = dataclasses.replace(base.model.moe, d_ff=24, every=1, **fields) if sparse else None
  # Widths that no two tensors share by chance.
  model = dataclasses.replace(
    base.model, d_model=80, head_dim=6, d_ff=112, vocab_size=272, moe=moe, compute_dtype="bfloat16",
    gradient_dtype=gradients, tie_embeddings=False,
  )  # fmt: skip
  spec = spec_of(dataclasses.replace(base, model=model))
  return make_train_step(spec).lower(*abstract_inputs(spec)).as_text(), spec


def matrices_widened(program, spec):
  """Conversions from bfloat16 to float32 of computed arrays of the shape of a matrix, or of a device's part of it."""
  shapes = {"80x48", "48x80"}  # queries, keys, values and output as plain matrices
  for leaf in jax.tree.leaves(spec.model.parameters):
    if leaf.ndim > 1:
      shapes |= {"x".join(map(str, shape)) for shape in (leaf.shape, leaf.sharding.shard_shape(leaf.shape))}
  found, rounded = [], set()  # the latter are weights as operands
  for line in program.splitlines():
    convert = re.search(
      r"(%\w+) = stablehlo\.convert (%\w+) : \(tensor<([\dx]+)x(\w+)>\) -> tensor<[\dx]+x(\w+)>", line
    )
    if convert is None:
      rounded -= set(re.findall(r"^\s*(%\w+) =", line))  # names are used anew in the next function
      continue
    name, of, shape, before, after = convert.groups()
    rounded = rounded | {name} if after == "bf16" else rounded - {name}
    if (before, after) == ("bf16", "f32") and of not in rounded and shape in shapes:
      found.append(line)
  return found


@pytest.mark.parametrize(
  "case", [pytest.param(case, marks=[] if case == "dense" else [pytest.mark.slow]) for case in CASES]
)
def test_no_matrixs_gradient_is_ever_bfloat16_in_the_train_step(case):
  assert not matrices_widened(*lowered(case, "float32"))
  assert matrices_widened(*lowered(case, "compute"))


def test_with_gradients_in_the_compute_type_the_products_of_every_matrixs_gradient_are_bfloat16():
  program, spec = lowered("dense", "compute")
  shapes = {tuple(sorted(leaf.shape[-2:])) for leaf in jax.tree.leaves(spec.model.parameters) if leaf.ndim > 1}
  assert (80, 272) in shapes, "the output projection"
  found = re.findall(r"stablehlo\.dot_general .* -> tensor<(\d+)x(\d+)x(\w+)>", program)
  types = [dtype for *shape, dtype in found if tuple(sorted(map(int, shape))) in shapes]
  assert types and set(types) == {"bf16"}


@pytest.mark.parametrize("gradients", ["float32", "compute"])
def test_no_sequence_has_a_gradient_of_the_output_projection_of_its_own(gradients):
  """Where sequences are sharded, too."""
  program, _ = lowered("dense", gradients, context=2)
  dots = re.findall(r"stablehlo\.dot_general .* -> tensor<([\dx]+)x\w+>", program)
  found = [shape for shape in dots if {"80", "272"} <= set(shape.split("x"))]
  assert found and all(shape.count("x") == 1 for shape in found), found


def test_the_routers_product_is_float32_at_full_precision():
  program, _ = lowered("einsum", "float32")
  dots = [
    line
    for line in program.splitlines()
    if "stablehlo.dot_general" in line and re.search(r"tensor<(\d+x)*(80x8|8x80)xf32>", line)
  ]
  # Forwards, and backwards to the input and to the weights.
  assert len(dots) >= 3 and all("precision = [HIGHEST, HIGHEST]" in line for line in dots), dots
