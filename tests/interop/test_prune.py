"""Which experts a layer keeps, against plain loops over all sets, and a pruned model against its layers."""

import dataclasses
import itertools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "moe"))
from inference_fixtures import DENSE, make
from moe_reference import choices_of_token, expert, scores_of

import moejax.interop.prune as pruning
from moejax.config import MoE, Router, TopKDepths
from moejax.errors import UserError
from moejax.inference.dropless import inference_model
from moejax.interop.layer_inputs import layer_inputs
from moejax.interop.prune import Pruned, choose, pruned_model, pruned_parameters
from moejax.models.attend import context_of

KEEP = 3
MODEL = dataclasses.replace(
  DENSE, layers="unrolled", moe=MoE(num_experts=5, experts_per_token=2, d_ff=16, every=2, dispatch="grouped")
)
RANDOM = np.random.default_rng(0)
BATCH = {
  "tokens": RANDOM.integers(0, 40, (2, 8)).astype(np.int32),
  "segments": np.array([[1] * 8, [1] * 5 + [0] * 3], np.int32),
  "positions": np.tile(np.arange(8, dtype=np.int32), (2, 1)),
}


def layers_of(config):
  model, parameters = make(config)
  return list(layer_inputs(model, parameters, [BATCH]))


def output(x_D, layer, kept, moe):
  """The output of some of the experts for a token, as a pruned layer has it."""
  weights = {name: np.asarray(w.value, np.float64) for name, w in layer.experts.weights(np.float32).matrices.items()}
  router_DE = np.asarray(layer.w_router_DE[...], np.float64)[:, kept]
  bias_E = np.zeros(len(kept)) if layer.bias_E is None else np.asarray(layer.bias_E[...])[kept]
  score_E = scores_of(x_D, router_DE, moe.router)
  choices = choices_of_token(score_E, score_E + bias_E, moe)
  return sum(w * expert(x_D, *(weights[name][kept[e]] for name in ("gate", "up", "down"))) for e, w in choices)


@pytest.mark.parametrize("greedy", [False, True], ids=["all sets", "one by one"])
@pytest.mark.parametrize(
  "router", [Router(), Router(scores="sigmoid", bias_rate=0.1, renormalize=False)], ids=["softmax", "biased sigmoid"]
)
def test_the_experts_are_kept_that_change_the_output_least(router, greedy, monkeypatch):
  moe = dataclasses.replace(MODEL.moe, router=router)
  monkeypatch.setattr(pruning, "MOST_SETS", 1 if greedy else 100)
  layer = layers_of(dataclasses.replace(MODEL, moe=moe))[1]
  tokens = np.asarray(layer.inputs[0], np.float64)[np.asarray(layer.valid[0])]

  def error(kept):
    changes = [output(x_D, layer.feed_forward, list(kept), moe) for x_D in tokens]
    whole = [output(x_D, layer.feed_forward, list(range(5)), moe) for x_D in tokens]
    return np.linalg.norm(np.subtract(changes, whole)) / np.linalg.norm(whole)

  got = choose(layer, KEEP)
  if greedy:
    kept = tuple(range(5))
    while len(kept) > KEEP:
      kept = min(itertools.combinations(kept, len(kept) - 1), key=error)
  else:
    kept = min(itertools.combinations(range(5), KEEP), key=error)
  assert got.kept == kept and got.error == pytest.approx(error(kept), rel=1e-3)


def test_the_skip_ratio_is_the_median_weight_of_second_choices():
  layer = layers_of(MODEL)[1]
  ratios = []
  for x_D in np.asarray(layer.inputs[0], np.float64)[np.asarray(layer.valid[0])]:
    score_E = np.sort(scores_of(x_D, np.asarray(layer.feed_forward.w_router_DE[...], np.float64), MODEL.moe.router))
    ratios.append(score_E[-2] / score_E[-1])
  assert choose(layer, KEEP).skip_ratio == pytest.approx(np.median(ratios), rel=1e-3)


def test_layer_inputs_are_those_of_the_layers_in_the_whole_model():
  model, parameters = make(MODEL)
  found = list(layer_inputs(model, parameters, [BATCH]))

  @jax.jit
  def by_layer(parameters, tokens_BT, *of_documents):
    """The inputs of the feed-forward layers, the output of the last block, and that of the whole model."""
    transformer, context = model.module(parameters), context_of(MODEL, *of_documents)
    inputs, x_BTD = [], parameters["embedding_VD"][tokens_BT]
    for block in transformer.layers[0].blocks:
      inputs.append(block.attend(x_BTD, context, None)[1])
      x_BTD, _, _ = block(x_BTD, context, None, None)
    return inputs, transformer.final_norm(x_BTD), transformer(tokens_BT, *of_documents)[0]

  inputs, out_BTD, expected_BTD = by_layer(parameters, *(BATCH[name] for name in ("tokens", "segments", "positions")))
  for layer, expected in zip(found, inputs, strict=True):
    np.testing.assert_allclose(layer.inputs[0], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(out_BTD, expected_BTD, rtol=1e-4, atol=1e-5)


def test_a_pruned_layer_has_the_matrices_and_router_columns_of_the_kept_experts():
  moe = dataclasses.replace(MODEL.moe, router=Router(bias_rate=0.1))
  config = dataclasses.replace(MODEL, moe=moe)
  model, parameters = make(config)
  made = pruned_parameters(parameters, {(0, 1): Pruned((0, 2, 4), 0.0, None)})
  fewer = inference_model(pruned_model(config, KEEP), model.partitioner)
  jax.tree.map(lambda there, here: np.testing.assert_equal(there.shape, here.shape), fewer.parameters, made)
  there, here = (tree["layers"][0]["blocks"][1]["feed_forward"] for tree in (parameters, made))
  np.testing.assert_array_equal(here["w_router_DE"], there["w_router_DE"][:, [0, 2, 4]])
  np.testing.assert_array_equal(here["bias_E"], there["bias_E"][np.array([0, 2, 4])])
  for name, w in there["experts"].items():
    np.testing.assert_array_equal(here["experts"][name], w[np.array([0, 2, 4])])


@pytest.mark.parametrize(
  ("moe", "keep", "message"),
  [
    (None, 2, "has no sparse layers"),
    (MODEL.moe, 5, r"--keep 5 must be between 1 and 4"),
    (MODEL.moe, 0, r"--keep 0 must be between 1 and 4"),
    (MODEL.moe, 1, "--keep 1 is not possible, because .* makes every weight 1.* so keep more"),
    (dataclasses.replace(MODEL.moe, router="expert_choice"), 2, "router.kind='expert_choice' is not supported"),
    (
      dataclasses.replace(MODEL.moe, num_experts=6, router=Router(expert_groups=3, groups_per_token=2)),
      2,
      r"router.expert_groups=3 is not supported by pruning",
    ),
    (
      dataclasses.replace(MODEL.moe, experts_per_token=1, router=Router(renormalize=False), weights_on="inputs"),
      2,
      r"moe\.weights_on='inputs' is not supported by pruning",
    ),
  ],
)
def test_what_cannot_be_pruned_is_refused(moe, keep, message):
  with pytest.raises(UserError, match=message):
    pruned_model(dataclasses.replace(MODEL, moe=moe), keep)


def test_a_mixture_of_depths_is_not_pruned():
  with pytest.raises(UserError, match=r"depths\.kind=top_k is not supported by pruning; use a run with kind all"):
    pruned_model(dataclasses.replace(MODEL, depths=TopKDepths()), KEEP)
