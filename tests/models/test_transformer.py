"""The whole model: what sees what, and that arrangement, recomputation and precision do not change the result."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import (
  DATA_EXPERT_MODEL,
  DenseRouter,
  EinsumDispatch,
  Mesh,
  Model,
  MoE,
  Router,
  ThresholdDepths,
  TopKDepths,
)
from moejax.config.parameters import parameter_counts
from moejax.models.moe.router_counts import sum_counts, token_counts
from moejax.models.moe.router_metrics import router_metrics
from moejax.models.transformer import Transformer
from moejax.partitioning import make_partitioner

DENSE = Model(num_layers=4, d_model=16, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=24, vocab_size=29, qk_norm=True)
SPARSE = dataclasses.replace(DENSE, moe=MoE(num_experts=4, experts_per_token=2, d_ff=12, every=2, group_size=6))
CAUSAL = dataclasses.replace(SPARSE, moe=dataclasses.replace(SPARSE.moe, dispatch=EinsumDispatch(priority="token")))
UNTIED = dataclasses.replace(DENSE, tie_embeddings=False, qk_norm=False, logit_cap=5.0)
DROPLESS = dataclasses.replace(
  SPARSE,
  num_layers=2,
  moe=MoE(num_experts=4, experts_per_token=2, d_ff=12, num_shared_experts=1, dispatch="grouped",
          router=Router(scores="sigmoid", bias_rate=0.01)),
)  # fmt: skip
DS_MOE = dataclasses.replace(
  DENSE,
  activation="gelu",
  attention_experts=2,
  moe=MoE(num_experts=4, experts_per_token=4, d_ff=12, every=2, dispatch="dense",
          router=DenseRouter()),
)  # fmt: skip
AHEAD = dataclasses.replace(SPARSE, multi_token_depth=2, tie_embeddings=False, norm="layer", norm_places="both")
AHEAD_DENSE = dataclasses.replace(DENSE, multi_token_depth=1)
TOP_K_DEPTHS = dataclasses.replace(DENSE, depths=TopKDepths(share=0.5), multi_token_depth=1)
TOP_K_SPARSE = dataclasses.replace(
  TOP_K_DEPTHS,
  moe=MoE(num_experts=4, experts_per_token=2, d_ff=12, num_shared_experts=1, shared_gate=True, dispatch="grouped"),
)
THRESHOLD_DEPTHS = dataclasses.replace(DENSE, depths=ThresholdDepths(every=1, share=1.0), norm="layer")
MODELS = {
  "dense": DENSE, "sparse": SPARSE, "untied": UNTIED, "causal": CAUSAL, "dropless": DROPLESS, "ds_moe": DS_MOE,
  "top_k_depths": TOP_K_DEPTHS, "top_k_depths, sparse": TOP_K_SPARSE, "threshold_depths": THRESHOLD_DEPTHS,
  "ahead": AHEAD, "ahead, dense": AHEAD_DENSE,
}  # fmt: skip


def new(model):
  partitioner = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
  return Transformer(model, partitioner, nnx.Rngs(params=0))


@functools.cache
def shapes(model):
  """The model without its numbers."""
  return nnx.eval_shape(lambda: new(model))


@functools.cache
def make(model):
  return nnx.merge(nnx.split(shapes(model))[0], jax.jit(lambda: nnx.to_pure_dict(nnx.split(new(model))[1]))())


def logits(model, tokens_BT, segments_BT=None):
  segments_BT = jnp.ones_like(tokens_BT) if segments_BT is None else segments_BT
  return _program(model)(nnx.split(make(model))[1], tokens_BT, segments_BT)


@functools.cache
def _program(model):
  """Compiled once for all tests of a model."""
  graph = nnx.split(make(model))[0]
  return jax.jit(lambda state, *batch: _logits(nnx.merge(graph, state), *batch))


def _logits(transformer, tokens_BT, segments_BT):
  positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  x_BTD, _ = transformer(tokens_BT, segments_BT, positions_BT)
  return transformer.logits(x_BTD.reshape(-1, x_BTD.shape[-1])).reshape(*tokens_BT.shape, -1)


def tokens(shape=(2, 12)):
  return jax.random.randint(jax.random.key(3), shape, 0, 29)


@pytest.mark.parametrize(
  "name",
  ["dense", "causal", *(pytest.param(name, marks=pytest.mark.slow) for name in ("untied", "dropless", "ds_moe"))],
)
def test_no_logit_depends_on_a_later_token(name):
  model, tokens_BT = MODELS[name], tokens()
  before = logits(model, tokens_BT)
  after = logits(model, tokens_BT.at[:, 7].add(1))
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert float(jnp.abs(before[:, 7:] - after[:, 7:]).max()) > 1e-3


def test_gshards_priority_lets_a_later_token_push_out_an_earlier_one():
  """Why `dispatch.priority` has a second value: this is what the first one does."""
  before = logits(SPARSE, tokens())
  changed = [logits(SPARSE, tokens().at[:, 7].add(i))[:, :7] for i in range(1, 6)]
  assert max(float(jnp.abs(before[:, :7] - after).max()) for after in changed) > 1e-3


def test_packed_documents_do_not_see_each_other():
  tokens_BT, segments_BT = tokens(), jnp.array([[1] * 5 + [2] * 7] * 2)
  before = logits(DENSE, tokens_BT, segments_BT)
  after = logits(DENSE, tokens_BT.at[:, 2].add(1), segments_BT)
  np.testing.assert_array_equal(before[:, 5:], after[:, 5:])
  assert float(jnp.abs(before[:, 2:5] - after[:, 2:5]).max()) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_formula_counts_the_parameters_that_the_model_makes(name):
  made = sum(leaf.size for leaf in jax.tree.leaves(nnx.split(shapes(MODELS[name]))[1]))
  assert made == parameter_counts(MODELS[name]).total


def test_layers_follow_the_period_of_dense_and_sparse():
  blocks = shapes(SPARSE).layers.blocks
  assert [type(block.feed_forward).__name__ for block in blocks] == ["MLPLayer", "MoELayer"]


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("sparse", marks=pytest.mark.slow),
    pytest.param("dropless", marks=pytest.mark.slow),
    pytest.param("ds_moe", marks=pytest.mark.nightly),  # whose layers are stacked and recomputed as those
  ],
)
def test_unrolled_layers_and_recomputation_give_the_same_logits_and_gradients(name):
  model = MODELS[name]
  if name != "sparse":  # of which every second layer is dense
    model = dataclasses.replace(model, num_layers=2, moe=dataclasses.replace(model.moe, every=1))
  expected = _loss_and_gradient_norm(model)
  others = [{"layers": "unrolled", "remat": "layer_inputs"}, *([{"remat": "dots"}] if name == "dropless" else [])]
  for fields in others:
    found = _loss_and_gradient_norm(dataclasses.replace(model, **fields))
    np.testing.assert_allclose(found, expected, rtol=2e-5, err_msg=str(fields))


def _loss_and_gradient_norm(model):
  graph, state = nnx.split(make(model))

  def total(parameters):
    return jnp.sum(jnp.square(_logits(nnx.merge(graph, parameters), tokens(), jnp.ones((2, 12), jnp.int32))))

  value, gradients = jax.jit(jax.value_and_grad(total))(nnx.to_pure_dict(state))
  return value, jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))


def reported(model):
  """Losses and statistics of a batch without padding."""
  segments_BT, positions_BT = jnp.ones((2, 12), jnp.int32), jnp.broadcast_to(jnp.arange(12), (2, 12))
  graph, state = nnx.split(make(model))
  group = model.moe.group_tokens(12)

  @jax.jit
  def metrics(state):
    _, counts = nnx.merge(graph, state)(tokens(), segments_BT, positions_BT)
    sums = {kind: sum_counts(of_kind, group, 12) for kind, of_kind in counts.items()}
    counts = token_counts(segments_BT > 0, group)
    return router_metrics(sums, counts, counts, model)

  return metrics(state)


def test_sparse_layers_report_losses_and_statistics_by_layer():
  auxiliary = reported(SPARSE)
  assert {name: loss.shape for name, loss in auxiliary.losses.items()} == dict.fromkeys(SPARSE.auxiliary_losses, (2,))
  assert auxiliary.statistics["load"].shape == (2, 4)
  np.testing.assert_allclose(auxiliary.statistics["load"].sum(axis=1), 1.0, rtol=1e-6)


def test_routers_over_heads_report_for_every_layer_and_those_over_experts_for_theirs():
  auxiliary = reported(DS_MOE)
  shapes = {name: loss.shape for name, loss in auxiliary.losses.items()}
  assert shapes == {"router_z": (2,), "mutual_information": (2,), "attention_mutual_information": (4,)}
  assert auxiliary.statistics["attention_entropy"].shape == (4,)


def test_bfloat16_compute_stays_near_float32_and_logits_are_float32():
  exact = logits(DENSE, tokens())
  rounded = logits(dataclasses.replace(DENSE, compute_dtype="bfloat16"), tokens())
  assert rounded.dtype == jnp.float32
  difference = float(jnp.abs(exact - rounded).max())
  assert 0.0 < difference < 0.15  # 8 bits of mantissa through 4 layers, logits of order 1


def test_the_logit_cap_bounds_every_logit():
  largest = float(jnp.abs(logits(dataclasses.replace(UNTIED, logit_cap=0.1), tokens())).max())
  assert largest == pytest.approx(0.1)


def test_logits_in_chunks_give_the_same_loss_and_gradients_in_a_fraction_of_the_memory():
  wide = dataclasses.replace(DENSE, num_layers=1, vocab_size=4096)
  x_BTD = jax.random.normal(jax.random.key(1), (4, 64, DENSE.d_model))
  targets_BT = jax.random.randint(jax.random.key(2), (4, 64), 0, 4096)

  def compiled(model):
    graph, state = nnx.split(make(model))

    def loss(state, x_BTD):
      return jnp.mean(nnx.merge(graph, state).score(x_BTD, targets_BT).loss_BT)

    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(state, x_BTD).compile(), state

  (whole, state), (chunks, _) = (compiled(dataclasses.replace(wide, logit_chunks=n)) for n in (1, 16))
  for one, other in zip(jax.tree.leaves(whole(state, x_BTD)), jax.tree.leaves(chunks(state, x_BTD)), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)
  of_logits = 4 * 4 * 64 * 4096
  whole_bytes, chunk_bytes = (program.memory_analysis().temp_size_in_bytes for program in (whole, chunks))
  assert whole_bytes >= of_logits > 2 * chunk_bytes
