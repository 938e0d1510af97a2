"""A rule table that an experiment accepts gives the loss and the gradients of one device."""

import dataclasses

import jax
import numpy as np
import pytest
from rule_tables import draw
from training_fixtures import random_batch, spec_of, tiny

from moejax.config import DATA_EXPERT_MODEL, ExpertChoiceRouter, Mesh, ThresholdDepths, TopKDepths, TopKRouter
from moejax.config.tensors import activations, parameters
from moejax.errors import UserError
from moejax.models.abstract import parameter_name
from moejax.partitioning import Partitioner
from moejax.training.step import _gradients, abstract_inputs

KINDS = ("dense", "moe", "mixture of attention")


@pytest.mark.parametrize(
  ("kind", "seed"),
  [
    # Of dense models, test_context.py and test_step.py have meshes too.
    pytest.param(kind, seed, marks=pytest.mark.slow if seed < 1 + (kind != "dense") else pytest.mark.nightly)
    for kind in KINDS
    for seed in range(20)
  ],
)
def test_any_table_that_is_accepted_gives_loss_and_gradients_of_one_device(kind, seed):
  one, many = draw(np.random.default_rng([seed, KINDS.index(kind)]), kind)
  parameters = jax.device_get(spec_of(one).init_state(0).parameters)
  (expected, expected_metrics), (found, metrics) = (gradients(experiment, parameters) for experiment in (one, many))
  explain = f"{many.mesh}, {dict(many.rules)}, {many.model}"
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=f"{name} with {explain}")
  for (path, mine), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
    largest = np.abs(other).max() + 1e-9
    np.testing.assert_allclose(
      mine / largest, other / largest, atol=2e-4, err_msg=f"{parameter_name(path)} with {explain}"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_any_table_that_is_accepted_traces(kind):
  _, many = draw(np.random.default_rng([100, KINDS.index(kind)]), kind)
  spec = spec_of(many)
  state, batch, _ = abstract_inputs(spec)
  found, _ = jax.eval_shape(lambda *given: _gradients(spec, *given), state.parameters, batch)
  assert jax.tree.map(lambda x: x.shape, found) == jax.tree.map(lambda x: x.shape, state.parameters)


def gradients(experiment, parameters):
  """Of a batch whose rows end in unlike padding: gradients and metrics."""
  spec = spec_of(experiment)
  batch = random_batch(experiment)
  padded = np.arange(batch["tokens"].shape[1])[None] >= 32 - 3 * np.arange(len(batch["tokens"]))[:, None]
  batch["segments"][padded], batch["weights"][padded] = 0, 0.0
  placed = jax.device_put((parameters, batch), (spec.model.shardings, spec.partitioner.batch))
  return jax.device_get(jax.jit(lambda parameters, batch: _gradients(spec, parameters, batch))(*placed))


def experiments():
  mesh = Mesh(data=2, expert=2, model=2)
  dense = tiny(False, mesh=mesh)
  yield "dense", dense, {"num_kv_heads": 2, "tie_embeddings": False}
  yield "unrolled", dense, {"qk_norm": True, "layers": "unrolled"}
  yield "mixture of attention", dense, {"num_kv_heads": 2, "attention_experts": 4}
  for depths in (TopKDepths(share=0.5), ThresholdDepths(share=0.25)):
    losses = dataclasses.replace(dense.training.losses, depths=0.01)
    model, training = (
      dataclasses.replace(dense.model, depths=depths),
      dataclasses.replace(dense.training, losses=losses),
    )
    yield f"depths, {depths.kind}", dataclasses.replace(dense, model=model, training=training), {}
    if depths.has_predictor:
      sparse = dataclasses.replace(tiny(True).model.moe, every=1, group_size=None)
      model = dataclasses.replace(model, moe=sparse)
      yield "depths, experts", dataclasses.replace(dense, model=model, training=training), {}
  moe = tiny(True, mesh=mesh)
  for name, base in (("dense", dense), ("sparse", moe)):
    losses = dataclasses.replace(base.training.losses, multi_token=0.3)
    training = dataclasses.replace(base.training, losses=losses)
    model = dataclasses.replace(base.model, multi_token_depth=2)
    for layers in ("scanned", "unrolled"):
      ahead = dataclasses.replace(base, model=model, training=training)
      yield f"multi-token, {name}, {layers}", ahead, {"layers": layers}
  for dispatch in ("einsum", "grouped", "dense"):
    for router in (TopKRouter(), ExpertChoiceRouter()):
      fields = dataclasses.replace(moe.model.moe, dispatch=dispatch, router=router, num_shared_experts=3)
      training = dataclasses.replace(moe.training, losses=dataclasses.replace(moe.training.losses, load_balance=0.0))
      yield f"{dispatch}, {router.kind}", dataclasses.replace(moe, training=training), {"moe": fields}


@pytest.mark.slow
@pytest.mark.parametrize(("base", "changes"), [pytest.param(*case[1:], id=case[0]) for case in experiments()])
def test_the_list_of_tensors_is_what_tracing_places(base, changes, monkeypatch):
  experiment = dataclasses.replace(base, model=dataclasses.replace(base.model, **changes))
  placed = set()

  def spec(self, names, shape, what, of=Partitioner.spec):
    placed.add(frozenset((name, size) for name, size in zip(names, shape, strict=True) if name is not None))
    return of(self, names, shape, what)

  monkeypatch.setattr(Partitioner, "spec", spec)
  spec = spec_of(experiment)
  state, batch, _ = abstract_inputs(spec)
  jax.eval_shape(lambda *given: _gradients(spec, *given), state.parameters, batch)
  model, batch_size = experiment.model, experiment.training.batch_size
  listed = [dimensions for _, dimensions in parameters(model)]
  listed += activations(model, batch_size, experiment.data.sequence_length, experiment.rules, experiment.mesh)
  listed = {frozenset(dimensions.items()) for dimensions in listed}
  assert not placed - listed, "tracing places what is not listed"
  within = {"outer", "groups", "group_tokens", "expert_mlp"}  # what grouped holds within a device
  assert not {tensor for tensor in listed - placed if {name for name, _ in tensor} != within}, "listed and never placed"


@pytest.mark.parametrize(
  ("sparse", "rules", "message"),
  [
    (False, {"sequence": ("model",), "act_embed": (), "heads": (), "kv_heads": (), "vocab": ()},
     r"activation batch x sequence x mlp: rules map both 'sequence' and 'mlp' to mesh axis 'model'"),
    (False, {"vocab": ("model", "expert"), "embed": ("data",)},
     r"activation batch x vocab: rules map both 'batch' and 'vocab' to mesh axis 'expert'"),
    (False, {"mlp": ("expert",), "embed": ()},
     r"activation batch x mlp: rules map both 'batch' and 'mlp' to mesh axis 'expert'"),
    (False, {"layers": ("model",)}, r"model\.num_heads: rules map both 'layers' and 'heads' to mesh axis 'model'"),
    (True, {"capacity": ("data",)},
     r"activation outer x groups x group_tokens x capacity: rules map both 'outer' and 'capacity' to mesh axis 'data'"),
    (True, {"experts": ("model",), "expert_mlp": ()},
     r"activation outer x experts x act_embed: rules map both 'experts' and 'act_embed' to mesh axis 'model'"),
  ],
)  # fmt: skip
def test_a_table_that_no_step_can_follow_is_refused_by_the_experiment(sparse, rules, message):
  experiment = tiny(sparse, mesh=Mesh(data=2, expert=2, model=2))
  if rules.get("layers"):
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, num_layers=4))
  with pytest.raises(UserError, match=f"^{message}"):
    dataclasses.replace(experiment, rules=(*DATA_EXPERT_MODEL, *rules.items()))
