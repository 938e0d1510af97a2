"""A model whose stacks of layers are taken apart computes the same."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from inference_fixtures import DENSE, EIGHT, ONE, SPARSE, full_logits, make

from moejax.inference.unrolled import unroll

ROWS = np.random.default_rng(0).integers(0, 40, (4, 6)).tolist()


@pytest.mark.parametrize(
  ("model", "mesh"),
  [
    pytest.param(dataclasses.replace(SPARSE, num_layers=4), EIGHT, marks=pytest.mark.slow),
    (dataclasses.replace(DENSE, num_layers=3), ONE),
  ],
  ids=["periods of two layers, on a mesh", "dense"],
)
def test_layers_one_by_one_give_the_logits_of_the_stack_and_the_stack_is_freed(model, mesh):
  abstract, parameters = make(model, mesh)
  expected = full_logits(abstract, parameters, ROWS)
  unrolled, apart = unroll(abstract, parameters)
  assert unrolled.config.layers == "unrolled"
  jax.tree.map(lambda here, there: np.testing.assert_equal(here.sharding, there.sharding), unrolled.parameters, apart)
  np.testing.assert_allclose(full_logits(unrolled, apart, ROWS), expected, rtol=1e-4, atol=1e-5)
  assert all(stack.is_deleted() for stack in jax.tree.leaves(parameters["layers"]))
  assert unroll(unrolled, apart) == (unrolled, apart)
