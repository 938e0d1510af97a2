"""A sparse model computes what the dense one does that it was made of."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
from inference_fixtures import DENSE, full_logits, make

from moejax.config import DATA_EXPERT_MODEL, Mesh, MoE
from moejax.errors import UserError
from moejax.inference.dropless import inference_model
from moejax.interop.upcycle import Upcycling, upcycled_model, upcycled_parameters
from moejax.partitioning import make_partitioner

ROWS = np.random.default_rng(0).integers(0, 40, (4, 9)).tolist()
UNROLLED = dataclasses.replace(DENSE, layers="unrolled", activation="gelu")


def upcycled(dense, how, mesh=None):
  """The dense model's logits, and those of the sparse one."""
  model, parameters = make(dense)
  config = upcycled_model(dense, how)
  mesh = mesh or Mesh(data=1)
  sparse = inference_model(config, make_partitioner(mesh, DATA_EXPERT_MODEL, jax.devices()[: mesh.size]))
  made = upcycled_parameters(jax.device_get(parameters), dense, config, how, jax.random.key(1))
  jax.tree.map(lambda there, here: np.testing.assert_equal(there.shape, here.shape), sparse.parameters, made)
  return full_logits(model, parameters, ROWS), full_logits(sparse, jax.device_put(made, sparse.shardings), ROWS)


@pytest.mark.parametrize(
  ("dense", "how", "mesh"),
  [
    (DENSE, Upcycling(experts=4), None),
    (DENSE, Upcycling(experts=4, active=1, granularity=2), Mesh(expert=2, model=2)),
    (UNROLLED, Upcycling(experts=3, active=2, granularity=4, every=2), None),
  ],
  ids=["copies", "slices on a mesh", "slices in every second layer, unrolled"],
)
def test_without_noise_the_sparse_model_computes_what_the_dense_one_does(dense, how, mesh):
  expected, got = upcycled(dense, how, mesh)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_noise_has_the_stated_deviation_and_differs_from_weight_to_weight():
  _, parameters = make(DENSE)
  how = Upcycling(experts=8, active=2, noise=0.1)

  def experts(how):
    made = upcycled_parameters(parameters, DENSE, upcycled_model(DENSE, how), how, jax.random.key(1))
    return made["layers"]["blocks"][0]["feed_forward"]["experts"]

  plain, noisy = experts(dataclasses.replace(how, noise=0.0)), experts(how)
  noise = {name: (noisy[name] - w) / np.std(w, axis=(2, 3), keepdims=True) for name, w in plain.items()}
  drawn = np.concatenate([np.ravel(each) for each in noise.values()])
  assert np.std(drawn) == pytest.approx(0.1, rel=0.05)
  assert len(np.unique(drawn)) > 0.99 * len(drawn)


def test_what_cannot_be_upcycled_is_refused():
  with pytest.raises(UserError, match="active=1 with granularity=1 is not supported"):
    Upcycling(experts=8, active=1)
  with pytest.raises(UserError, match="active=3 is more than experts=2"):
    Upcycling(experts=2, active=3)
  with pytest.raises(UserError, match="d_ff=32 is not divisible by granularity=3"):
    upcycled_model(DENSE, Upcycling(experts=4, granularity=3))
  with pytest.raises(UserError, match="has sparse layers"):
    upcycled_model(
      dataclasses.replace(DENSE, moe=MoE(num_experts=2, experts_per_token=2, d_ff=4)), Upcycling(experts=4)
    )
