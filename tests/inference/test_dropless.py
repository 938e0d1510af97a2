"""An inference model holds the trained model's parameters and drops nothing."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from moejax.config import DATA_EXPERT_MODEL, ExpertChoiceRouter, Mesh, Model, MoE
from moejax.config.remat import SAVED
from moejax.errors import UserError
from moejax.inference.dropless import inference_model
from moejax.interop.same_function import differences
from moejax.models.moe.router_counts import EXPERTS
from moejax.models.transformer import Transformer
from moejax.partitioning import make_partitioner

MOE = MoE(num_experts=4, experts_per_token=2, d_ff=16, group_size=24, capacity_factor=0.5)
TRAINED = Model(
  num_layers=2, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=8, vocab_size=40, moe=MOE, remat="dots"
)
PARTITIONER = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL)
TOKENS_BT = np.random.default_rng(0).integers(0, 40, (2, 12)).astype(np.int32)


@partial(jax.jit, static_argnums=0)
def features(graph, parameters, tokens_BT):
  positions_BT = jax.numpy.broadcast_to(jax.numpy.arange(12), tokens_BT.shape)
  x_BTD, counts = nnx.merge(graph, parameters)(tokens_BT, jax.numpy.ones_like(tokens_BT), positions_BT)
  return x_BTD, counts[EXPERTS]["dropped"]


def graph_of(model):
  return nnx.split(nnx.eval_shape(lambda: Transformer(model, PARTITIONER, nnx.Rngs(params=0))))[0]


@pytest.mark.slow
def test_an_inference_model_equals_the_model_whose_capacity_drops_nothing_and_not_the_one_that_drops():
  abstract = inference_model(TRAINED, PARTITIONER)
  parameters = jax.jit(lambda: nnx.to_pure_dict(nnx.split(Transformer(TRAINED, PARTITIONER, nnx.Rngs(params=0)))[1]))()
  got, dropped = features(abstract.graph, parameters, TOKENS_BT)
  assert not np.any(dropped)
  roomy = dataclasses.replace(TRAINED, moe=dataclasses.replace(MOE, capacity_factor=2.0))
  expected, dropped = features(graph_of(roomy), parameters, TOKENS_BT)
  assert not np.any(dropped)
  np.testing.assert_allclose(got, expected, atol=2e-5)
  cut, dropped = features(graph_of(TRAINED), parameters, TOKENS_BT)
  assert np.all(dropped > 0.3) and np.abs(got - cut).max() > 1e-2


@pytest.mark.parametrize("remat", SAVED)
def test_what_training_keeps_for_the_backward_pass_does_not_matter(remat):
  """A model that was trained with offloaded activations is the same for inference."""
  selected = ("context", "products") if remat == "selected" else ()
  trained = dataclasses.replace(
    TRAINED, remat=remat, save_activations=selected, offload_activations=(*SAVED[remat], *selected)
  )
  plain = inference_model(dataclasses.replace(TRAINED, remat="none"), PARTITIONER)
  assert inference_model(trained, PARTITIONER).config == plain.config
  assert not list(differences(trained, TRAINED))


def test_a_model_whose_experts_choose_their_tokens_is_refused():
  router = ExpertChoiceRouter()
  moe = MoE(num_experts=4, experts_per_token=2, d_ff=16, router=router)
  with pytest.raises(UserError, match="is not causal"):
    inference_model(dataclasses.replace(TRAINED, moe=moe), PARTITIONER)
