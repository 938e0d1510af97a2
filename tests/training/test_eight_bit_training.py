"""Training with 8-bit products: which products of the step they are, and that a mesh changes nothing."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from training_fixtures import initial_state, random_batch, run_steps, spec_of, tiny

from moejax.config import AdamW, EinsumDispatch, GroupedDispatch, Mesh, Precision
from moejax.training.loss import denominators, loss_sums, objective
from moejax.training.step import abstract_inputs, make_train_step

KINDS = ("attention", "feed_forward", "experts", "logits")


def rounded(sparse=True, compute_dtype="bfloat16", mesh=None, dispatch=None, **kinds):
  """A tiny experiment with 8-bit products."""
  base = tiny(sparse, mesh=mesh or Mesh(data=1))
  model = dataclasses.replace(base.model, precision=Precision(**kinds), compute_dtype=compute_dtype)
  if dispatch:
    factor = 4.0 if dispatch.has_capacity else 1.0  # without drops
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, dispatch=dispatch, capacity_factor=factor))
  return dataclasses.replace(base, model=model)


@functools.cache
def products(experiment):
  """The types of the operands and of the result of each matrix product of the train step, by what JAX traced."""
  spec = spec_of(experiment)
  text = make_train_step(spec).lower(*abstract_inputs(spec)).as_text()
  found = re.findall(
    r"dot_general.*: \(tensor<[\dx]*?x?(\w+)>, tensor<[\dx]*?x?(\w+)>\) -> tensor<[\dx]*?x?(\w+)>", text
  )
  return [tuple(re.sub(r"^.*x", "", name) for name in types) for types in found]


@pytest.mark.parametrize(
  "kind", [pytest.param(kind, marks=[] if kind == "experts" else [pytest.mark.slow]) for kind in KINDS]
)
def test_each_product_of_a_kind_of_layer_has_8_bits_forwards_and_in_both_products_of_the_backward_pass(kind):
  plain, low = products(rounded()), products(rounded(**{kind: "fp8"}))
  forwards = {"attention": 4, "feed_forward": 3, "experts": 3, "logits": 1}[kind] * (2 if kind == "attention" else 1)
  e4m3, e5m2 = "f8E4M3FN", "f8E5M2"
  of_8 = [sorted(types[:2]) for types in low if types[0].startswith("f8")]
  assert of_8.count([e4m3, e4m3]) == forwards and of_8.count([e4m3, e5m2]) == 2 * forwards
  assert len(of_8) == 3 * forwards and all(types[2] == "f32" for types in low if types[0].startswith("f8"))
  assert len(low) == len(plain) and not any(types[0].startswith("f8") for types in plain)


def test_parameters_gradients_router_and_losses_stay_float32():
  everything = rounded(**dict.fromkeys(KINDS, "fp8"))
  spec = spec_of(everything)
  new_state, metrics = jax.eval_shape(make_train_step(spec), *abstract_inputs(spec))
  floats = [leaf.dtype for leaf in jax.tree.leaves((new_state, metrics)) if np.issubdtype(leaf.dtype, np.floating)]
  assert set(floats) == {np.dtype("float32")}
  assert ("f32", "f32", "f32") in products(everything)  # the router


def test_scales_are_no_state_that_a_checkpoint_would_have_to_hold():
  states = [spec_of(rounded(**dict.fromkeys(KINDS, bits))).abstract_state for bits in ("compute", "fp8")]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
  shapes = [[(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(state)] for state in states]
  assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_the_compiled_program_keeps_parameters_and_second_moments_in_float32():
  """With all that may be narrower: 8-bit products, gradients and first moments in bfloat16."""
  experiment = rounded(mesh=Mesh(data=2, model=2), **dict.fromkeys(KINDS, "fp8"))
  experiment = dataclasses.replace(
    experiment,
    model=dataclasses.replace(experiment.model, gradient_dtype="compute"),
    optimizer=AdamW(learning_rate=1e-3, moment_dtype="bfloat16"),
  )
  spec = spec_of(experiment)
  text = make_train_step(spec).lower(*abstract_inputs(spec)).compile().as_text()
  into, out_of = re.search(r"entry_computation_layout=\{\((.*)\)->\((.*?)\)\}", text.splitlines()[0]).groups()
  arrays = len([leaf for leaf in jax.tree.leaves(spec.model.parameters) if leaf.ndim])
  for side in (into, out_of):
    found = re.findall(r"(?:^|[ ,])(bf16|f32)\[[\d,]+\]", re.sub(r"/\*.*?\*/", " ", side))
    assert found.count("bf16") == arrays and found.count("f32") >= 2 * arrays


MESHES = (Mesh(data=8), Mesh(data=2, expert=2, model=2), Mesh(data=1, model=8))


@functools.cache
def gradients(mesh=None, sparse=False, dispatch=None, **kinds):
  """By path, of the first batch, in float32 beside the 8-bit products."""
  experiment = rounded(sparse, "float32", mesh, dispatch, **kinds)
  spec, batch = spec_of(experiment), random_batch(experiment)
  state = initial_state(experiment.model, experiment.optimizer, 0)
  placed = jax.device_put((state.parameters, batch), (spec.shardings.parameters, spec.partitioner.batch))

  def loss(parameters, batch):
    sums = loss_sums(spec.model.module(parameters), batch)
    return objective(sums, denominators(batch, experiment.model), experiment.model, experiment.training.losses)[0]

  found = jax.device_get(jax.jit(jax.grad(loss))(*placed))
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


def distances(one, other):
  """Of each matrix, relative to its size. The sums of other gradients cancel."""
  return {path: np.linalg.norm(one[path] - other[path]) / np.linalg.norm(other[path])
          for path in other if other[path].size > 1000}  # fmt: skip


DENSE, EXPERTS = ("attention", "feed_forward", "logits"), ("experts",)


@pytest.mark.parametrize(
  ("kinds", "bits", "meshes"),
  [
    pytest.param(DENSE, "fp8", MESHES, id="dense, fp8", marks=pytest.mark.slow),
    # How values are placed depends neither on their type nor on whether a product has experts.
    pytest.param(DENSE, "int8", MESHES[1:2], id="dense, int8", marks=pytest.mark.slow),
    pytest.param(EXPERTS, "fp8", MESHES[1:2], id="experts, fp8", marks=pytest.mark.slow),
    *(
      pytest.param(kinds, bits, MESHES, id=f"every mesh, {kinds[-1]}, {bits}", marks=pytest.mark.nightly)
      for kinds, bits in ((DENSE, "int8"), (EXPERTS, "fp8"), (EXPERTS, "int8"))
    ),
  ],
)
def test_every_mesh_rounds_as_one_device_does(kinds, bits, meshes):
  """The scales are of whole rows and columns. A sum in another order may round a value to its neighbour in 8 bits."""
  sparse, chosen = kinds == EXPERTS, dict.fromkeys(kinds, bits)
  expected = gradients(sparse=sparse, **chosen)
  rounding = distances(expected, gradients(sparse=sparse))
  for mesh in meshes:
    found = distances(gradients(mesh, sparse, **chosen), expected)
    assert max(found[path] / rounding[path] for path in found) < 0.2, (mesh, found, rounding)


@pytest.mark.parametrize(
  "bits", [pytest.param("fp8", marks=pytest.mark.slow), pytest.param("int8", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("exchange", ["all_to_all", "all_gather"])
def test_dropless_experts_round_as_one_device_does_on_every_mesh_and_as_einsum_does_without_drops(bits, exchange):
  """Rows of one expert may be on several devices, which agree on the scales of its gradient."""
  dropless = GroupedDispatch(exchange=exchange)
  expected = gradients(sparse=True, dispatch=GroupedDispatch(), experts=bits)
  rounding = distances(expected, gradients(sparse=True, dispatch=GroupedDispatch()))
  assert max(rounding.values()) > 1e-3
  # Without an expert axis nothing is exchanged, in neither way.
  meshes = [mesh for mesh in MESHES if mesh.expert > 1 or exchange == "all_to_all"]
  others = [gradients(mesh, True, dropless, experts=bits) for mesh in meshes]
  for other in (*others, gradients(sparse=True, dispatch=EinsumDispatch(), experts=bits)):
    found = distances(other, expected)
    assert max(found[path] / rounding[path] for path in found) < 0.2, (found, rounding)


@pytest.mark.slow
def test_chunks_of_tokens_have_scales_of_their_own_and_gradients_that_are_as_near():
  """Each chunk rounds its part of the gradient of a matrix, as each microbatch does."""
  plain = gradients(sparse=True, dispatch=GroupedDispatch())
  mesh = Mesh(data=2, expert=4)
  whole, chunked = (
    distances(gradients(mesh, True, GroupedDispatch(exchange_chunks=chunks), experts="fp8"), plain) for chunks in (1, 2)
  )
  assert max(abs(chunked[path] / whole[path] - 1) for path in whole) > 1e-3  # other orders of sums differ by 1e-6
  assert all(chunked[path] < 1.5 * whole[path] for path in whole)


@pytest.mark.slow
def test_gradients_of_8_bit_products_are_near_those_of_plain_ones():
  for bits, most in (("int8", 0.1), ("fp8", 0.4)):
    found = distances(gradients(attention=bits, feed_forward=bits, logits=bits), gradients())
    assert min(found.values()) > 0 and max(found.values()) < most, (bits, found)


@pytest.mark.slow
def test_a_tiny_model_learns_a_batch_with_8_bits_almost_as_fast():
  plain = np.array(run_steps(rounded(sparse=False), 30)[1])
  for bits, most in (("fp8", 0.1), ("int8", 0.05)):
    low = np.array(run_steps(rounded(sparse=False, attention=bits, feed_forward=bits, logits=bits), 30)[1])
    assert low[-1] < 0.5 * low[0] and 0 < np.abs(low / plain - 1).max() < most, (bits, low, plain)
