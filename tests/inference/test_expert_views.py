"""Experts as arrays of their own share the memory of their stacks, and generate the same tokens."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from inference_fixtures import DENSE, EIGHT, ONE, SPARSE, make

from moejax.config import DenseRouter, MoE
from moejax.config.precision import Precision
from moejax.inference import expert_views
from moejax.inference import generate as generate_module
from moejax.inference.dropless import inference_model
from moejax.inference.expert_views import round_experts, separate_experts
from moejax.inference.generate import Generator
from moejax.inference.sparse import Sparse
from moejax.models.moe.experts import FEW

LARGE = dataclasses.replace(
  SPARSE, layers="unrolled", num_layers=2, moe=dataclasses.replace(SPARSE.moe, d_ff=expert_views.LARGE // 128)
)
DS_MOE = dataclasses.replace(
  DENSE, layers="unrolled", moe=MoE(num_experts=4, experts_per_token=4, d_ff=16, router=DenseRouter(), dispatch="dense")
)


def test_matrices_of_experts_share_the_memory_of_their_stacks_and_all_else_is_unchanged():
  model, parameters = make(LARGE)
  separate = separate_experts(model, parameters)
  experts, stacks = (tree["layers"][0]["blocks"][1]["feed_forward"]["experts"] for tree in (separate, parameters))
  for name, stack in stacks.items():
    addresses = [matrix.unsafe_buffer_pointer() for matrix in experts[name]]
    assert addresses == [stack.unsafe_buffer_pointer() + e * stack[0].nbytes for e in range(len(stack))]
    np.testing.assert_array_equal(np.stack(experts[name]), stack)
  rest = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 1]  # noqa: E731
  assert all(here is there for here, there in zip(rest(separate), rest(parameters), strict=True))


@pytest.mark.parametrize(
  ("model", "mesh"),
  [
    (dataclasses.replace(LARGE, layers="scanned"), ONE),
    (LARGE, EIGHT),
    (dataclasses.replace(LARGE, moe=dataclasses.replace(LARGE.moe, d_ff=16)), ONE),
    (DS_MOE, ONE),
    (DENSE, ONE),
  ],
  ids=["stacks of layers", "several devices", "small experts", "every expert", "dense"],
)
def test_other_parameters_are_unchanged(model, mesh):
  abstract, parameters = make(model, mesh)
  separate = separate_experts(abstract, parameters)
  assert jax.tree.structure(separate) == jax.tree.structure(parameters)
  assert all(a is b for a, b in zip(jax.tree.leaves(separate), jax.tree.leaves(parameters), strict=True))


# Of int8, products of 8 bits have tests of their own (tests/kernels/test_grouped_eight_bits.py).
@pytest.mark.parametrize(
  "bits", [pytest.param("fp8", marks=pytest.mark.slow), pytest.param("int8", marks=pytest.mark.nightly)]
)
def test_experts_that_are_rounded_once_generate_the_tokens_of_those_rounded_for_every_token(bits, monkeypatch):
  model, parameters = make(dataclasses.replace(SPARSE, layers="unrolled", precision=Precision(experts=bits)))
  of_8_bits = [leaf for leaf in jax.tree.leaves(round_experts(model, parameters)) if leaf.dtype.itemsize == 1]
  assert len(of_8_bits) == 3
  prompts = [[3, 1, 4, 1, 5], [2], list(range(FEW + 1))]

  def generate():
    stops = [lambda ids: False] * len(prompts)
    return dict(Generator(model, 2, 40).generate(parameters, prompts, stops, max_new=6))

  once = generate()
  monkeypatch.setattr(generate_module, "round_experts", lambda model, parameters: parameters)
  assert once == generate()
  assert len({tuple(ids) for ids in once.values()}) == len(prompts)


@pytest.mark.parametrize(("model", "mesh"), [(SPARSE, EIGHT), (dataclasses.replace(SPARSE, layers="scanned"), ONE)])
def test_experts_of_several_devices_and_stacks_of_layers_are_not_rounded_before(model, mesh):
  abstract, parameters = make(dataclasses.replace(model, precision=Precision(experts="fp8")), mesh)
  assert all(leaf.dtype.itemsize == 4 for leaf in jax.tree.leaves(round_experts(abstract, parameters)))


def test_more_arrays_than_a_program_compiles_in_seconds_stay_stacked(monkeypatch):
  model, parameters = make(LARGE)
  monkeypatch.setattr(expert_views, "MOST", 3 * 4 - 1)
  assert separate_experts(model, parameters) is parameters


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("top-k", marks=pytest.mark.nightly),  # as the next one, without biases
    pytest.param("biased experts", marks=pytest.mark.slow),
    pytest.param("DS-MoE with few experts", marks=pytest.mark.slow),
  ],
)
def test_separate_experts_generate_the_tokens_of_stacks(name, monkeypatch):
  model, parameters = make(
    {
      "top-k": dataclasses.replace(SPARSE, layers="unrolled"),
      "biased experts": dataclasses.replace(
        SPARSE, layers="unrolled", activation="swiglu_clipped", moe=dataclasses.replace(SPARSE.moe, bias=True)
      ),
      "DS-MoE with few experts": DS_MOE,
    }[name]
  )
  if name.startswith("DS-MoE"):
    model = inference_model(DS_MOE, model.partitioner, Sparse("threshold", 1.0))
  prompts = [[3, 1, 4, 1, 5], [2], list(range(FEW + 1))]  # the last is too long for separate experts

  def generate(batch_size):
    stops = [lambda ids: False] * len(prompts)
    return dict(Generator(model, batch_size, 40).generate(parameters, prompts, stops, max_new=6))

  expected = generate(2)
  monkeypatch.setattr(expert_views, "LARGE", 0)
  assert expected == generate(2) == generate(1)
  assert len({tuple(ids) for ids in expected.values()}) == len(prompts)
