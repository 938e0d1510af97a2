"""A sparse model computes what the dense one does that it was made of."""

import dataclasses
import itertools
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from inference_fixtures import DENSE, full_logits, make
from training_fixtures import tiny

from moejax.config import DATA_EXPERT_MODEL, Attention, Mesh, MoE, TopKDepths
from moejax.config.fields import with_fields
from moejax.errors import UserError
from moejax.inference.dropless import inference_model
from moejax.inference.load import Loaded
from moejax.interop.first_checkpoint import stacked_as
from moejax.interop.upcycle import (
  Upcycling,
  distilled_parameters,
  upcycle,
  upcycled_experiment,
  upcycled_model,
  upcycled_parameters,
)
from moejax.models.abstract import abstract_model
from moejax.partitioning import make_partitioner
from moejax.progress import Progress
from moejax.training.run_directory import claim

ROWS = np.random.default_rng(0).integers(0, 40, (4, 9)).tolist()
WINDOWS = dataclasses.replace(DENSE, attention=(Attention(window=3), Attention()))
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
    (WINDOWS, Upcycling(experts=4, active=1, granularity=2), Mesh(expert=2, model=2)),
    (UNROLLED, Upcycling(experts=3, active=2, granularity=4, every=2), None),
  ],
  ids=["copies", "slices on a mesh, windows", "slices in every second layer, unrolled"],
)
def test_without_noise_the_sparse_model_computes_what_the_dense_one_does(dense, how, mesh):
  expected, got = upcycled(dense, how, mesh)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def by_layer(parameters, model):
  """The parameters of each layer, from the first to the last."""
  layers = parameters["layers"]
  if model.layers == "scanned":
    layers = {p: jax.tree.map(lambda x, p=p: x[p], layers) for p in range(model.num_periods)}
  return [layers[p]["blocks"][b] for p in range(model.num_periods) for b in range(model.period)]


@pytest.mark.parametrize(  # with 2, `every` is less, equal and more
  "pattern", [pytest.param(n, marks=pytest.mark.slow if n == 2 else pytest.mark.nightly) for n in (1, 2, 4)]
)
def test_every_layer_keeps_its_place_for_each_pattern_of_attention_and_form_of_the_layers(pattern):
  attention = tuple(Attention(window=i + 2) for i in range(pattern))
  random = np.random.default_rng(0)
  for form, other, every in itertools.product(("scanned", "unrolled"), ("scanned", "unrolled"), (1, 2, 4)):
    dense = dataclasses.replace(DENSE, num_layers=8, attention=attention, layers=form)
    how = Upcycling(experts=2, every=every)
    sparse = dataclasses.replace(upcycled_model(dense, how), layers=other)
    models = [abstract_model(each, make_partitioner(Mesh(), DATA_EXPERT_MODEL)) for each in (dense, sparse)]
    drawn = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), models[0].parameters)
    made = jax.device_get(upcycled_parameters(drawn, dense, sparse, how, jax.random.key(0)))
    jax.tree.map(lambda there, here: np.testing.assert_equal(here.shape, there.shape), models[1].parameters, made)
    for number, (there, here) in enumerate(zip(by_layer(drawn, dense), by_layer(made, sparse), strict=True), 1):
      np.testing.assert_array_equal(here["attention"]["w_q_DNH"], there["attention"]["w_q_DNH"])
      up_DF, feed_forward = there["feed_forward"]["w_up_DF"], here["feed_forward"]
      experts = feed_forward["experts"]["w_up_EDF"] if number % every == 0 else [feed_forward["w_up_DF"]]
      for expert_DF in experts:
        np.testing.assert_array_equal(expert_DF, up_DF)


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


@pytest.mark.slow
def test_distilled_layers_are_closer_to_the_dense_ones_and_the_others_are_unchanged():
  dense = dataclasses.replace(DENSE, num_layers=4)
  model, parameters = make(dense)
  how = Upcycling(experts=1, granularity=4, active=2, every=2, distill_tokens=64)
  sparse = upcycled_model(dense, how)
  assert (sparse.moe.num_experts, sparse.moe.experts_per_token, sparse.moe.d_ff) == (4, 2, 8)
  tokens_BT = np.random.default_rng(1).integers(0, 40, (4, 16)).astype(np.int32)
  positions_BT = np.tile(np.arange(16, dtype=np.int32), (4, 1))
  batch = {"tokens": tokens_BT, "segments": np.ones_like(tokens_BT), "positions": positions_BT}
  before = jax.device_get(parameters)
  notes: list[str] = []

  class Notes(Progress):
    def note(self, text: str) -> None:
      notes.append(text)

  experiment = dataclasses.replace(tiny(True), model=sparse)
  made = distilled_parameters(Loaded(experiment, model, parameters, 0), experiment, how, [batch], Notes())
  spec = inference_model(sparse, model.partitioner)
  stacked = stacked_as(spec, made)
  jax.tree.map(lambda there, here: np.testing.assert_equal(there.shape, here.shape), spec.parameters, stacked)
  np.testing.assert_array_equal(
    made["layers"][1]["blocks"][0]["feed_forward"]["w_up_DF"],
    before["layers"]["blocks"][0]["feed_forward"]["w_up_DF"][2],
  )
  errors = [[float(x) for x in re.findall(r"[0-9]+\.[0-9]+", note)] for note in notes]
  assert len(errors) == 2 and all(after < 0.7 * start for start, after in errors)


def test_what_cannot_be_upcycled_is_refused():
  with pytest.raises(UserError, match="active=1 with granularity=1 is not supported"):
    Upcycling(experts=8, active=1)
  with pytest.raises(UserError, match="active=3 is more than experts=2"):
    Upcycling(experts=2, active=3)
  with pytest.raises(UserError, match="active=5 is more than the 4 experts"):
    Upcycling(experts=1, granularity=4, active=5, distill_tokens=8)
  with pytest.raises(UserError, match="d_ff=32 is not divisible by granularity=3"):
    upcycled_model(DENSE, Upcycling(experts=4, granularity=3))
  with pytest.raises(UserError, match=r"depths\.kind=top_k is not supported by upcycling; use a run with kind all"):
    upcycled_model(dataclasses.replace(DENSE, depths=TopKDepths(every=1)), Upcycling(experts=4))
  with pytest.raises(UserError, match="has sparse layers"):
    upcycled_model(
      dataclasses.replace(DENSE, moe=MoE(num_experts=2, experts_per_token=2, d_ff=4)), Upcycling(experts=4)
    )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_layers": 4}, "model.num_layers=4 must be 2"),
    ({"norm_epsilon": 0.1}, "model.norm_epsilon=0.1 must be 1e-05"),
    ({"activation": "gelu"}, "model.activation='gelu' must be 'swiglu'"),
    ({"moe.d_ff": 8}, "model.moe.d_ff=8 must be 32"),
    ({"moe.num_shared_experts": 1}, "model.moe.num_shared_experts=1 must be 0"),
    ({"moe.router.renormalize": False}, "model.moe.router.renormalize=False must be True"),
    ({"moe.router.scale": 2.0}, "model.moe.router.scale=2.0 must be 1.0"),
  ],
  ids=str,
)
def test_a_field_that_would_change_the_function_is_refused_before_anything_is_written(fields, message, tmp_path):
  dense, how = tiny(False), Upcycling(experts=2)
  claim(tmp_path / "dense", dense, 6)
  made = upcycled_experiment(dense, tmp_path / "new", how, 0.0)
  changed = dataclasses.replace(made, model=with_fields(made.model, fields))
  with pytest.raises(UserError, match=re.escape(message)):
    upcycle(tmp_path / "dense", tmp_path / "new", changed, how)
  assert not (tmp_path / "new").exists()


def test_a_run_that_does_not_fit_in_memory_is_refused_before_it_is_allocated(tmp_path):
  dense, how = tiny(False), Upcycling(experts=10**9)
  claim(tmp_path / "dense", dense, 6)
  with pytest.raises(UserError, match=r"new needs .* of memory on each device"):
    upcycle(tmp_path / "dense", tmp_path / "new", upcycled_experiment(dense, tmp_path / "new", how, 0.0), how)
