"""Mixture of depths: layers of some tokens are those of a plain loop, whatever is packed, and look at nothing later."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_transformer import DENSE, logits, tokens

from moejax.config import DATA_EXPERT_MODEL, GroupedQuery, Mesh, MoE, Router
from moejax.config.depths import ThresholdDepths, TopKDepths
from moejax.models.attend import context_of
from moejax.models.depths import RoutedBlock, collect, order_of, spread
from moejax.models.moe.router_counts import CHOSEN, DEPTHS, EXPERTS
from moejax.partitioning import make_partitioner

LENGTHS = [[7, 5], [1, 3, 6], [12], [2]]
"""Of the documents of each row. What is left of a row is padding."""
KINDS = {
  "top_k": TopKDepths(every=1, share=0.4),
  "predicted": TopKDepths(every=1, share=0.4).causal(),
  "threshold": ThresholdDepths(every=1, share=1.0, threshold=0.45),
  "threshold, limited": ThresholdDepths(every=1, share=0.25, threshold=0.45),
}


EXPERTS_OF_CHOSEN = {
  "grouped": MoE(num_experts=4, experts_per_token=2, d_ff=12, dispatch="grouped", num_shared_experts=1),
  "einsum": MoE(num_experts=4, experts_per_token=2, d_ff=12, dispatch="einsum", capacity_factor=2.0),
}
"""Sparse layers that drop no token."""


def routed(depths, attention=None, moe=None):
  attention = attention or GroupedQuery()
  model = dataclasses.replace(DENSE, depths=depths, attention=(attention,), moe=moe)
  placement = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
  return model, nnx.jit(lambda: RoutedBlock(attention, model, moe is not None, placement, nnx.Rngs(params=0)))()


def packed():
  rows, T = len(LENGTHS), 12
  segments_BT, positions_BT = np.zeros((rows, T), np.int32), np.zeros((rows, T), np.int32)
  for row, lengths in enumerate(LENGTHS):
    at = 0
    for number, length in enumerate(lengths, 1):
      segments_BT[row, at : at + length] = number
      positions_BT[row, at : at + length] = np.arange(length)
      at += length
  x_BTD = np.random.default_rng(0).normal(size=(rows, T, DENSE.d_model)).astype(np.float32)
  return x_BTD, segments_BT, positions_BT


def chosen_by_hand(module, depths, x_TD, valid_T):
  """Which tokens of a sequence go through the layer, and the weight of each."""
  outputs_T = x_TD @ np.asarray(module.w_router_DX[...])[:, 0]
  real = np.flatnonzero(valid_T)
  if isinstance(depths, TopKDepths):
    return sorted(sorted(real, key=lambda t: (-outputs_T[t], t))[: int(np.ceil(depths.share * len(x_TD)))]), outputs_T
  if isinstance(depths, ThresholdDepths):
    gates_T = 1 / (1 + np.exp(-outputs_T))
    return [t for t in real if gates_T[t] >= depths.threshold][: int(np.ceil(depths.share * len(x_TD)))], gates_T
  predicted_T = x_TD @ np.asarray(module.w_predictor_DX[...])[:, 0] + float(module.b_predictor_X[0])
  return [t for t in real if predicted_T[t] > 0], outputs_T


@pytest.mark.parametrize(
  ("name", "attention", "moe"),
  [
    *((name, GroupedQuery(), None) for name in KINDS),
    *(pytest.param(name, GroupedQuery(window=2), None, marks=pytest.mark.slow) for name in KINDS),
    ("top_k", GroupedQuery(), "grouped"),
    *(pytest.param("top_k", GroupedQuery(), moe, marks=pytest.mark.slow) for moe in ("einsum",)),
    *(pytest.param("predicted", GroupedQuery(), moe, marks=pytest.mark.slow) for moe in EXPERTS_OF_CHOSEN),
  ],
)
def test_the_chosen_tokens_of_each_document_go_through_the_layer_as_a_text_of_their_own(name, attention, moe):
  depths = KINDS[name]
  model, module = routed(depths, attention, EXPERTS_OF_CHOSEN.get(moe))
  x_BTD, segments_BT, positions_BT = packed()
  run = jax.jit(lambda *given: module(given[0], context_of(model, *given[1:]), None, None)[:2])
  out_BTD, counts = run(x_BTD, segments_BT, positions_BT)
  expected_BTD, texts = x_BTD.copy(), []
  for row, segments_T in enumerate(segments_BT):
    chosen, weights_T = chosen_by_hand(module, depths, x_BTD[row], segments_T > 0)
    assert int(counts[DEPTHS]["through"][row]) == len(chosen)
    of_documents = ([t for t in chosen if segments_T[t] == number] for number in set(segments_T) - {0})
    texts += [(row, chosen, weights_T) for chosen in of_documents if chosen]
  # Each document in a row of its own, one program for all of them.
  alone_BTD = np.zeros((len(texts), *x_BTD.shape[1:]), np.float32)
  real_BT, places_BT = np.zeros((2, *alone_BTD.shape[:2]), np.int32)
  for number, (row, of_document, _) in enumerate(texts):
    alone_BTD[number, : len(of_document)], real_BT[number, : len(of_document)] = x_BTD[row, of_document], 1
    places_BT[number, : len(of_document)] = positions_BT[row, of_document]
  alone = jax.jit(lambda x_BTD, *given: module.block(x_BTD, context_of(model, *given), None, None)[:2])
  after_BTD, of_experts = alone(alone_BTD, real_BT, places_BT)
  expected_E = np.sum(of_experts[EXPERTS]["choices"], axis=(0, 1)) if moe else 0
  for (row, of_document, weights_T), after_TD in zip(texts, np.asarray(after_BTD), strict=True):
    x_TD = x_BTD[row, of_document]
    expected_BTD[row, of_document] = x_TD + weights_T[of_document, None] * (after_TD[: len(of_document)] - x_TD)
  np.testing.assert_allclose(out_BTD, expected_BTD, atol=2e-5)
  if moe:  # a token that skips the layer, and padding, are of no expert
    np.testing.assert_array_equal(np.sum(counts[CHOSEN]["choices"], axis=(0, 1)), expected_E)
    assert expected_E.sum() == 2 * np.sum(counts[DEPTHS]["through"]) == 2 * np.sum(counts[CHOSEN]["tokens"])
    assert not np.sum(counts[CHOSEN]["dropped"])
  assert 0 < np.sum(np.abs(expected_BTD - x_BTD).max(axis=-1) > 1e-3) < (segments_BT > 0).sum()


def test_with_all_tokens_the_layer_is_that_of_a_dense_model_times_the_weights():
  model, module = routed(TopKDepths(every=1, share=1.0))
  x_BTD, segments_BT, positions_BT = packed()

  @jax.jit
  def routed_and_whole(x_BTD, *of_documents):
    arguments = x_BTD, context_of(model, *of_documents), None, None
    return *module(*arguments)[:2], module.block(*arguments)[0]

  out_BTD, counts, whole_BTD = routed_and_whole(x_BTD, segments_BT, positions_BT)
  weight_BT1 = x_BTD @ np.asarray(module.w_router_DX[...])
  real_BT1 = (segments_BT > 0)[..., None]
  np.testing.assert_allclose(out_BTD, np.where(real_BT1, x_BTD + weight_BT1 * (whole_BTD - x_BTD), x_BTD), atol=2e-5)
  np.testing.assert_array_equal(counts[DEPTHS]["through"], (segments_BT > 0).sum(axis=1))


@pytest.mark.parametrize("slots", [1, 5, 12])
def test_collecting_and_spreading_are_each_others_transposes(slots):
  random = np.random.default_rng(slots)
  order = order_of(jnp.asarray(random.random((3, 12)) < 0.5), slots)
  x_BTD, y_BCD = (random.normal(size=(3, n, 4)).astype(np.float32) for n in (12, slots))
  plain_BTD = np.zeros_like(x_BTD)
  for row in range(3):
    plain_BTD[row, np.asarray(order.token_BC)[row]] = y_BCD[row]
  np.testing.assert_array_equal(spread(y_BCD, order.token_BC, order.slot_BT), plain_BTD)
  of_collect = jax.vjp(lambda x: collect(x, order.token_BC, order.slot_BT), x_BTD)[1](jnp.asarray(y_BCD))[0]
  of_spread = jax.vjp(lambda y: spread(y, order.token_BC, order.slot_BT), y_BCD)[1](jnp.asarray(x_BTD))[0]
  np.testing.assert_array_equal(of_collect, plain_BTD)
  np.testing.assert_array_equal(of_spread, np.take_along_axis(x_BTD, np.asarray(order.token_BC)[..., None], axis=1))


def test_only_chosen_tokens_take_capacity():
  """An expert has room for half of the choices if all are its own, so that it drops the other half."""
  moe = MoE(num_experts=4, experts_per_token=1, d_ff=12, capacity_factor=2.0, group_size=4, dispatch="einsum",
            router=Router(renormalize=False))  # fmt: skip
  model, module = routed(TopKDepths(every=1, share=1 / 3), moe=moe)
  module.block.feed_forward.w_router_DE[...] = jnp.zeros((DENSE.d_model, 4))  # ties, which the first expert wins
  x_BTD, segments_BT, positions_BT = packed()
  run = jax.jit(lambda x_BTD, *of_documents: module(x_BTD, context_of(model, *of_documents), None, None)[1])
  counts = run(x_BTD, segments_BT, positions_BT)
  through_B = np.minimum(4, (segments_BT > 0).sum(axis=1))
  choices_BE = np.asarray(counts[CHOSEN]["choices"])[0]
  np.testing.assert_array_equal(choices_BE, through_B[:, None] * [1, 0, 0, 0])
  np.testing.assert_array_equal(counts[CHOSEN]["dropped"][0], np.maximum(0, through_B - 2))


CAUSAL = {name: dataclasses.replace(DENSE, depths=dataclasses.replace(KINDS[name], every=2)) for name in KINDS}


CAUSAL["predicted, experts"] = dataclasses.replace(
  CAUSAL["predicted"], moe=dataclasses.replace(EXPERTS_OF_CHOSEN["grouped"], every=1)
)


@pytest.mark.parametrize(
  "name", ["predicted", *(pytest.param(name, marks=pytest.mark.slow) for name in ("threshold", "predicted, experts"))]
)
def test_in_evaluation_no_logit_depends_on_a_later_token_or_on_another_document(name):
  model, tokens_BT = CAUSAL[name], tokens((4, 12))
  before = logits(model, tokens_BT)
  for later in (4, 9):
    after = logits(model, tokens_BT.at[:, later].add(1))
    np.testing.assert_allclose(before[:, :later], after[:, :later], atol=1e-6)
    assert float(jnp.abs(before[:, later:] - after[:, later:]).max()) > 1e-3
  segments_BT = jnp.array([[1] * 5 + [2] * 7] * 4)
  packed_BTV = logits(model, tokens_BT, segments_BT)
  np.testing.assert_allclose(packed_BTV[:, :5], before[:, :5], atol=1e-6)
  other = logits(model, tokens_BT.at[:, 2].add(1), segments_BT)
  np.testing.assert_allclose(packed_BTV[:, 5:], other[:, 5:], atol=1e-6)


@pytest.mark.slow
def test_in_training_top_k_looks_ahead():
  """Why evaluation has a predictor."""
  model, tokens_BT = CAUSAL["top_k"], tokens((8, 12))
  before = logits(model, tokens_BT)
  changed = [logits(model, tokens_BT.at[:, 9].add(i))[:, :9] for i in range(1, 6)]
  assert max(float(jnp.abs(before[:, :9] - after).max()) for after in changed) > 1e-3
