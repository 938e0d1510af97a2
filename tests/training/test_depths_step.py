"""A step with a mixture of depths: the same on every mesh and in parts, with the products of the formula."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from test_accumulation import PADDINGS, check_equal, padded
from training_fixtures import product_flops, spec_of, tiny

from moejax.config import AllTokens, Mesh, MoE, ThresholdDepths, TopKDepths
from moejax.config.parameters import flops_per_token, parameter_counts, tokens_per_step
from moejax.errors import UserError
from moejax.evaluation.held_out import make_scorer
from moejax.training.metrics import flatten
from moejax.training.step import BATCH_TYPES, _gradients, abstract_inputs, make_train_step

KINDS = {"top_k": TopKDepths(share=0.25), "threshold": ThresholdDepths(share=0.5, threshold=0.4)}
SPARSE = {
  "experts, capacity": MoE(num_experts=8, experts_per_token=2, d_ff=16, group_size=8),
  "experts, dropless": MoE(num_experts=8, experts_per_token=2, d_ff=16, dispatch="grouped", num_shared_experts=1),
  "experts in every second": MoE(num_experts=8, experts_per_token=2, d_ff=16, every=2, group_size=8),
}
"""Sparse layers, of which the last one is routed too."""


def experiment_of(depths, parts=1, mesh=None, loss=0.01, **model):
  base = tiny(False)
  losses = dataclasses.replace(base.training.losses, depths=loss)
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, depths=depths, **model),
    training=dataclasses.replace(base.training, losses=losses, gradient_accumulation=parts),
    mesh=mesh or Mesh(data=1),
  )


def with_experts(kind, parts=1, mesh=None):
  if kind in KINDS:
    return experiment_of(KINDS[kind], parts, mesh)
  base = experiment_of(KINDS["top_k"], parts, mesh, moe=SPARSE[kind])
  losses = dataclasses.replace(
    base.training.losses, load_balance=0.01, sequence_balance=0.01, global_balance=0.01, router_z=0.001
  )
  return dataclasses.replace(base, training=dataclasses.replace(base.training, losses=losses))


@functools.cache
def gradients_of(kind, parts=1, mesh=None):
  experiment = with_experts(kind, parts, mesh)
  spec, batch = spec_of(experiment), padded(experiment, PADDINGS["by part"])
  parameters = jax.device_get(spec_of(with_experts(kind)).init_state(0).parameters)
  placed = jax.device_put((parameters, batch), (spec.model.shardings, spec.partitioner.batch))
  return jax.device_get(jax.jit(lambda parameters, batch: _gradients(spec, parameters, batch))(*placed))


@pytest.mark.parametrize("kind", [*KINDS, *SPARSE])
@pytest.mark.parametrize(
  ("parts", "mesh"),
  [
    pytest.param(4, None, marks=pytest.mark.nightly),
    pytest.param(2, Mesh(data=2, expert=2, model=2), marks=pytest.mark.slow),  # parts too, and a mesh
  ],
  ids=str,
)
def test_parts_and_meshes_train_routed_layers_as_one_device_does(kind, parts, mesh):
  gradients, metrics = gradients_of(kind, parts, mesh)
  check_equal((gradients, metrics), gradients_of(kind))
  real = sum(PADDINGS["by part"])
  record = flatten(metrics, with_experts(kind).model)
  assert 0 < record["router/depth_share/layer_01"] < 1 and "router/depth_share/layer_00" not in record
  if kind != "threshold":  # of each sequence a quarter, but no padding
    chosen = sum(min(8, length) for length in PADDINGS["by part"])
    assert record["router/depth_share/layer_01"] == pytest.approx(chosen / real)
    layers = {"layer_00": real, "layer_01": chosen} if "every" not in kind else {"layer_01": chosen}
    if kind in SPARSE:
      for number, (layer, tokens) in enumerate(layers.items()):
        assert metrics["router/choices"][number].sum() == 2 * tokens
        assert record[f"router/choices_per_token/{layer}"] == pytest.approx(2)
        assert 0 < record[f"router/entropy/{layer}"] <= math.log(8)
      assert metrics["loss/load_balance"] > 0.9
  else:
    assert record["router/depth_dropped_fraction/layer_01"] > 0
  small = [path for path, x in jax.tree_util.tree_leaves_with_path(gradients) if np.abs(x).max() < 1e-9]
  assert not small, "every parameter is trained"


@pytest.mark.parametrize(
  ("depth", "sparse"),
  [  # what has a module has all that is without one
    (1, False),
    pytest.param(1, True, marks=pytest.mark.slow),
    pytest.param(0, False, marks=pytest.mark.nightly),
    pytest.param(0, True, marks=pytest.mark.nightly),
  ],
)
def test_a_traced_step_of_routed_layers_has_the_products_of_the_formula(depth, sparse):
  base = tiny(False)
  losses = dataclasses.replace(base.training.losses, depths=0.01, multi_token=0.3 * depth)
  every = TopKDepths(every=1, share=0.5)
  moe = MoE(num_experts=2, experts_per_token=2, d_ff=16, dispatch="dense", router="dense", num_shared_experts=1)
  for depths in (every, KINDS["top_k"]) if sparse else (*KINDS.values(), every):
    experiment = dataclasses.replace(
      base,
      model=dataclasses.replace(
        base.model, depths=depths, layers="unrolled", multi_token_depth=depth, moe=moe if sparse else None
      ),
      training=dataclasses.replace(base.training, losses=losses),
    )
    spec = spec_of(experiment)
    traced = make_train_step(spec).trace(*abstract_inputs(spec)).jaxpr
    assert product_flops(traced.jaxpr) == tokens_per_step(experiment) * flops_per_token(experiment.model, 32)


def test_a_token_uses_its_share_of_the_parameters_of_routed_layers():
  model = tiny(False).model
  plain = parameter_counts(model)
  for depths, predictor in ((TopKDepths(share=0.25), 33), (ThresholdDepths(share=0.25), 0)):
    counted = parameter_counts(dataclasses.replace(model, depths=depths))
    assert counted.total == plain.total + 32 + predictor
    of_layer = (plain.total - model.vocab_size * 32 - 32) // 2
    assert counted.active == counted.total - 0.75 * of_layer


def test_a_token_uses_its_share_of_the_experts_that_it_is_sent_to():
  model = dataclasses.replace(tiny(True).model, depths=TopKDepths(share=0.25))  # the second layer is sparse and routed
  counted, plain = parameter_counts(model), parameter_counts(dataclasses.replace(model, depths=AllTokens()))
  attention, expert, norms = 4 * 32 * 32, 3 * 32 * 16, 2 * 32
  assert counted.total == plain.total + 32 + 33
  assert counted.active == plain.active + 32 + 33 - 0.75 * (attention + 32 * 8 + 2 * expert + norms)


TOP_K = TopKDepths()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"depths": TOP_K, "loss": 0.0}, r"model\.depths\.kind=top_k with training\.losses\.depths=0 would not train"),
    ({"depths": TOP_K.causal()}, r"model\.depths\.kind=predicted is not for training; use top_k or threshold"),
    ({"depths": AllTokens()}, r"training\.losses\.depths=0\.01 would have no effect: model\.depths\.kind is all"),
    ({"depths": TopKDepths(every=3)}, r"model\.num_layers=2 is not divisible by depths\.every=3"),
    (
      {"depths": ThresholdDepths(), "moe": tiny(True).model.moe},
      r"model\.depths\.kind=threshold is not supported with model\.moe, .* use depths\.kind=top_k",
    ),
    (
      {"depths": TopKDepths(share=0.3), "moe": dataclasses.replace(tiny(True).model.moe, group_size=64)},
      r"moe\.group_size=64 does not divide the 160 tokens that go through a sparse layer of model\.depths\.kind=top_k: "
      r"depths\.share=0\.3 of data\.sequence_length=32 is 10 tokens of each of the 16 sequences of "
      r"training\.batch_size / gradient_accumulation; use 32, or None",
    ),
    (
      {"depths": TOP_K, "num_kv_heads": 4, "attention_experts": 2},
      r"model\.depths\.kind=top_k is not supported with model\.attention_experts",
    ),
  ],
)
def test_a_mixture_that_cannot_work_is_refused(fields, message):
  with pytest.raises(UserError, match=f"^{message}"):
    experiment_of(**fields)


def of_chosen_tokens(size, parts=1, mesh=None):
  moe = dataclasses.replace(tiny(True).model.moe, group_size=size)
  return experiment_of(TopKDepths(share=0.3), parts, mesh, moe=moe)


@pytest.mark.parametrize(("parts", "mesh"), [(1, None), (4, None), (1, Mesh(data=4, expert=2))], ids=str)
def test_the_group_size_that_a_refusal_names_works(parts, mesh):
  with pytest.raises(UserError, match="tokens that go through a sparse layer") as caught:
    of_chosen_tokens(64 if mesh is None else 32, parts, mesh)
  named = int(re.search(r"; use (\d+), or None", str(caught.value))[1])
  assert of_chosen_tokens(named, parts, mesh) and of_chosen_tokens(None, parts, mesh)
  if mesh is not None:
    assert "the 20 tokens that go through a sparse layer of model.depths.kind=top_k on each of 8 shards" in str(
      caught.value
    )
  with pytest.raises(UserError, match="tokens that go through a sparse layer"):
    of_chosen_tokens(2 * named, parts, mesh)


@pytest.mark.slow
def test_groups_of_chosen_tokens_need_not_divide_those_of_evaluation_which_takes_all_tokens():
  base = of_chosen_tokens(32)  # 4 sequences have 40 chosen tokens, and 128 in all
  experiment = dataclasses.replace(base, evaluation=dataclasses.replace(base.evaluation, batch_size=4))
  spec = spec_of(experiment)
  make_train_step(spec).trace(*abstract_inputs(spec))
  batch = {name: jax.ShapeDtypeStruct((4, 32), dtype) for name, dtype in BATCH_TYPES.items()}
  loss_BT, _ = jax.eval_shape(make_scorer(spec), spec.model.parameters, batch)
  assert loss_BT.shape == (4, 32)
