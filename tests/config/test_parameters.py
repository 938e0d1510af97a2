"""Parameters, FLOPs and budgets of the tiny experiments, by hand.

The tiny model: L = 2 layers, D = 16, N = 4 and K = 2 heads of H = 4, F = 24, V = 264, T = 32. Its sparse variant has
E = 4 experts of F = 8 in the second layer, A = 2 a token.
"""

from dataclasses import replace

import pytest

from moejax.config import Budget
from moejax.config.parameters import (
  ParameterCounts,
  budget_tokens,
  flops_per_token,
  flops_per_token_at,
  full_sequence_steps,
  parameter_counts,
  tokens_per_step,
)
from moejax.errors import UserError

ATTENTION = 16 * 16 + 16 * 8 + 16 * 8 + 16 * 16  # w_q, w_k, w_v, w_o
NORMS = 2 * 16  # before attention and before the feed-forward
FEED_FORWARD = 3 * 16 * 24  # gate, up, down
EXPERT = 3 * 16 * 8
ROUTER = 16 * 4
FINAL_NORM = 16
EMBEDDING = 264 * 16


def test_a_dense_model_is_all_active(tiny_dense):
  total = 2 * (ATTENTION + NORMS + FEED_FORWARD) + FINAL_NORM + EMBEDDING
  assert total == 8144
  assert parameter_counts(tiny_dense.model) == ParameterCounts(total=8144, active=8144, embedding=4224)


def test_a_sparse_layer_has_a_router_and_experts_of_which_a_token_uses_some(tiny_moe):
  dense_layer = ATTENTION + NORMS + FEED_FORWARD
  shared = dense_layer + ATTENTION + NORMS + ROUTER + FINAL_NORM + EMBEDDING
  assert (shared + 4 * EXPERT, shared + 2 * EXPERT) == (8592, 7824)
  assert parameter_counts(tiny_moe.model) == ParameterCounts(total=8592, active=7824, embedding=4224)


def test_experts_in_every_layer_leave_no_dense_feed_forward(tiny_moe):
  model = replace(tiny_moe.model, moe=replace(tiny_moe.model.moe, every=1))
  total = 2 * (ATTENTION + NORMS + ROUTER + 4 * EXPERT) + FINAL_NORM + EMBEDDING
  assert parameter_counts(model).total == total == 9040
  assert parameter_counts(replace(model, d_ff=1000)) == parameter_counts(model)


@pytest.mark.parametrize("kind", ["tiny_dense", "tiny_moe"])
def test_an_untied_output_projection_is_a_second_embedding(kind, request):
  model = request.getfixturevalue(kind).model
  tied, untied = parameter_counts(model), parameter_counts(replace(model, tie_embeddings=False))
  assert untied.total - tied.total == untied.active - tied.active == untied.embedding - tied.embedding == EMBEDDING
  assert untied.non_embedding == tied.non_embedding


def test_normalized_queries_and_keys_have_a_scale_each_per_layer(tiny_dense):
  assert parameter_counts(replace(tiny_dense.model, qk_norm=True)).total == 8144 + 2 * 2 * 4


def test_norms_over_all_heads_have_a_scale_for_each_of_their_dimensions(tiny_dense):
  model = replace(tiny_dense.model, qk_norm=True, qk_norm_over="all_heads")
  assert parameter_counts(model).total == 8144 + 2 * (4 + 2) * 4


def test_queries_keys_and_values_may_have_biases_and_shared_experts_a_gate(tiny_dense, tiny_moe):
  assert parameter_counts(replace(tiny_dense.model, attention_bias=True)).total == 8144 + 2 * (4 + 2 + 2) * 4
  shared = replace(tiny_moe.model, moe=replace(tiny_moe.model.moe, num_shared_experts=1))
  gated = replace(shared, moe=replace(shared.moe, shared_gate=True))
  assert parameter_counts(gated).active == parameter_counts(shared).active + 16
  with pytest.raises(UserError, match=r"moe\.shared_gate=True would have no effect"):
    replace(tiny_moe.model.moe, shared_gate=True)
  with pytest.raises(UserError, match=r"model\.qk_norm_over='all_heads' would have no effect"):
    replace(tiny_dense.model, qk_norm_over="all_heads")


def test_each_kind_of_count_is_what_its_name_says(tiny_moe):
  parameters = parameter_counts(tiny_moe.model)
  assert {kind: parameters.counted(kind) for kind in ("total", "active", "non_embedding", "active_non_embedding")} == {
    "total": 8592,
    "active": 7824,
    "non_embedding": 8592 - 4224,
    "active_non_embedding": 7824 - 4224,
  }


def test_flops_are_6_per_matrix_parameter_that_a_token_meets_and_attention(tiny_dense, tiny_moe):
  attention = 12 * 2 * 4 * 4 * 32
  dense = 2 * (ATTENTION + FEED_FORWARD) + EMBEDDING
  assert flops_per_token(tiny_dense.model, 32) == 6 * dense + attention == 60_672
  sparse = (ATTENTION + FEED_FORWARD) + (ATTENTION + ROUTER + 2 * EXPERT) + EMBEDDING
  assert flops_per_token(tiny_moe.model, 32) == 6 * sparse + attention == 58_752


def test_flops_of_attention_grow_with_the_sequence(tiny_dense):
  difference = flops_per_token(tiny_dense.model, 33) - flops_per_token(tiny_dense.model, 32)
  assert difference == 12 * 2 * 4 * 4


@pytest.mark.parametrize(
  "change", [{"tie_embeddings": False}, {"qk_norm": True}, {"attention_bias": True}, {"remat": "dots"}]
)
def test_flops_count_neither_the_look_up_nor_norms_nor_recomputation(tiny_dense, change):
  assert flops_per_token(replace(tiny_dense.model, **change), 32) == 60_672


def test_capacity_and_idle_experts_cost_no_model_flops_but_each_adds_to_the_router(tiny_moe):
  moe = tiny_moe.model.moe
  wider = replace(tiny_moe.model, moe=replace(moe, capacity_factor=2.0))
  assert flops_per_token(wider, 32) == 58_752
  more = replace(tiny_moe.model, moe=replace(moe, num_experts=8))
  assert flops_per_token(more, 32) == 58_752 + 6 * 16 * 4


def test_what_an_expert_does_not_take_is_no_work(tiny_dense, tiny_moe):
  assert flops_per_token_at(tiny_moe.model, 32, 2.0) == 58_752
  for choices in (0.0, 0.5, 1.3, 3.0):  # expert choice may take more than A
    assert flops_per_token_at(tiny_moe.model, 32, choices) == 58_752 - 6 * EXPERT * (2 - choices)
  assert flops_per_token_at(tiny_dense.model, 32, None) == 60_672


def test_a_step_has_batch_times_length_tokens_whatever_the_accumulation(tiny_dense):
  assert tokens_per_step(tiny_dense) == 8 * 32
  parts = replace(tiny_dense, training=replace(tiny_dense.training, gradient_accumulation=4))
  assert tokens_per_step(parts) == 8 * 32


@pytest.mark.parametrize(
  ("budget", "tokens"),
  [
    (Budget(), 20 * 8592),
    (Budget(parameters="active"), 20 * 7824),
    (Budget(parameters="non_embedding"), 20 * 4368),
    (Budget(parameters="active_non_embedding"), 20 * 3600),
    (Budget(tokens_per_parameter=0.3), 2578),  # 2577.6 upwards
  ],
)
def test_a_budget_is_a_multiple_of_the_parameters_that_it_counts(tiny_moe, budget, tokens):
  assert budget_tokens(tiny_moe.model, budget) == tokens


def test_steps_are_as_many_as_the_budget_needs_or_as_set(tiny_dense):
  assert full_sequence_steps(tiny_dense) == 637  # 20 x 8144 / 256 = 636.25
  assert full_sequence_steps(replace(tiny_dense, training=replace(tiny_dense.training, steps=7))) == 7


def test_modules_for_multi_token_prediction_add_a_layer_a_projection_and_logits(tiny_dense, tiny_moe):
  for model, layer in ((tiny_dense.model, ATTENTION + FEED_FORWARD), (tiny_moe.model, ATTENTION + ROUTER + 2 * EXPERT)):
    ahead, projection, norms = replace(model, multi_token_depth=2), 2 * 16 * 16, 5 * 16
    before, after = parameter_counts(model), parameter_counts(ahead)
    assert after.active - before.active == 2 * (layer + projection + norms)
    assert after.embedding == before.embedding
    per_module = 6 * (layer + projection + EMBEDDING) + 12 * 4 * 4 * 32
    assert flops_per_token(ahead, 32) - flops_per_token(model, 32) == 2 * per_module
    assert budget_tokens(ahead, Budget()) == budget_tokens(model, Budget())
  total = parameter_counts(replace(tiny_moe.model, multi_token_depth=1)).total - parameter_counts(tiny_moe.model).total
  assert total == ATTENTION + ROUTER + 4 * EXPERT + 2 * 16 * 16 + 5 * 16
