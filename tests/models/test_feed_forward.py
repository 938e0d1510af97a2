"""A feed-forward layer of the user's: it is counted, checked and computed as moejax's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import DATA_EXPERT_MODEL, MLP, FeedForward, Mesh, Model, MoE, checks
from moejax.config.parameters import flops_per_token, parameter_counts
from moejax.config.tensors import check_parameters
from moejax.errors import UserError
from moejax.models.feed_forward import FEED_FORWARDS
from moejax.models.transformer import Transformer
from moejax.models.weights import weight
from moejax.partitioning import make_partitioner

MODEL = Model(num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, vocab_size=264)
ONE_DEVICE = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twice(FeedForward, kind="test_twice"):
  """One square of the hidden dimension, used twice, and a scale."""

  factor: float = 1.0

  def __post_init__(self):
    checks.positive(self, "factor")

  def shapes(self, d_model, d_ff, gated):
    return {"w": {"embed": d_model, "mlp": d_ff}, "scale": {None: d_model}}

  def flops_per_token(self, d_model, d_ff, gated):
    return 2 * 6 * d_model * d_ff


class TwiceLayer(nnx.Module):
  def __init__(self, config, model, partitioner, rngs):
    self.w_DF = weight(rngs, (model.d_model, model.d_ff), ("embed", "mlp"), fan_in=model.d_model)
    self.scale_D = nnx.Param(jnp.full(model.d_model, config.factor), names=(None,))

  def __call__(self, x_BTD):
    return x_BTD @ self.w_DF[...] @ self.w_DF[...].T * self.scale_D[...].reshape(1, 1, -1)


@pytest.fixture
def known(monkeypatch):
  monkeypatch.setitem(FEED_FORWARDS, Twice, TwiceLayer)


def changed(**fields) -> Model:
  return dataclasses.replace(MODEL, **fields)


def features(model: Model) -> np.ndarray:
  module = Transformer(model, ONE_DEVICE, nnx.Rngs(0))
  tokens_BT = jnp.arange(8).reshape(1, 8)
  return np.asarray(module(tokens_BT, jnp.ones((1, 8), int), tokens_BT)[0])


def test_the_model_computes_with_the_layer_and_its_fields(known):
  of_mlp, twice, more = (features(changed(feed_forward=kind)) for kind in (MLP(), Twice(), Twice(factor=3.0)))
  assert not np.allclose(of_mlp, twice) and not np.allclose(twice, more)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "every second layer sparse"])
def test_its_parameters_and_flops_are_counted(known, sparse):
  moe = MoE(num_experts=4, experts_per_token=2, d_ff=8, every=2, group_size=8) if sparse else None
  model = changed(feed_forward=Twice(), moe=moe)
  made = nnx.split(nnx.eval_shape(lambda: Transformer(model, ONE_DEVICE, nnx.Rngs(0))))[1]
  assert sum(leaf.size for leaf in jax.tree.leaves(made)) == parameter_counts(model).total
  of_layer = 2 * 6 * 16 * 24 - 6 * 3 * 16 * 24  # in place of gate, up and down
  assert flops_per_token(model, 8) - flops_per_token(changed(moe=moe), 8) == (1 if sparse else 2) * of_layer


def test_the_rules_are_checked_for_its_parameters():
  mesh, model = Mesh(data=1, model=5), changed(d_ff=24, feed_forward=Twice())
  with pytest.raises(UserError, match=r"model\.d_ff: mlp=24 is not divisible by the 5 shards"):
    check_parameters(model, (*DATA_EXPERT_MODEL, ("heads", ()), ("kv_heads", ()), ("vocab", ())), mesh)


def test_what_would_have_no_effect_and_a_layer_without_a_function_are_refused():
  moe = MoE(num_experts=4, experts_per_token=2, d_ff=8, group_size=8)
  with pytest.raises(UserError, match=r"^model\.feed_forward=test_twice would have no effect because every layer"):
    changed(feed_forward=Twice(), moe=moe)
  with pytest.raises(UserError, match=r"^feed_forward\.factor=0 must be above 0$"):
    Twice(factor=0)
  with pytest.raises(UserError, match=r"^feed_forward Twice has no function; add one, as in .*FEED_FORWARDS\[Twice"):
    features(changed(feed_forward=Twice()))
