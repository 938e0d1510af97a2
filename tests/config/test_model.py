"""The transformer's shape: what fits together, and where the sparse layers are."""

from dataclasses import replace

import pytest

from moejax.config import MoE
from moejax.errors import UserError

MOE = MoE(num_experts=4, experts_per_token=2, d_ff=8, group_size=32)


@pytest.mark.parametrize(
  ("num_layers", "every", "period", "sparse"), [(4, 1, 1, 4), (4, 2, 2, 2), (6, 3, 3, 2), (4, 4, 4, 1)]
)
def test_every_nth_layer_is_sparse(tiny_dense, num_layers, every, period, sparse):
  model = replace(tiny_dense.model, num_layers=num_layers, moe=replace(MOE, every=every))
  assert (model.period, model.num_periods, model.num_sparse_layers) == (period, num_layers // period, sparse)


def test_a_dense_model_repeats_after_each_layer_and_has_no_sparse_one(tiny_dense):
  model = replace(tiny_dense.model, num_layers=3)
  assert (model.period, model.num_periods, model.num_sparse_layers) == (1, 3, 0)


@pytest.mark.parametrize(
  "name",
  ["num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "vocab_size", "rope_theta",
   "norm_epsilon", "logit_cap"],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, -2])
def test_sizes_must_be_above_0(tiny_dense, name, value):
  with pytest.raises(UserError, match=rf"^model\.{name}={value} must be above 0$"):
    replace(tiny_dense.model, **{name: value})


def test_a_logit_cap_that_would_make_logits_0_is_refused(tiny_dense):
  with pytest.raises(UserError, match=r"^model\.logit_cap=1e\+30 must lie between 1e-06 and 1000000\.0"):
    replace(tiny_dense.model, logit_cap=1e30)


@pytest.mark.parametrize(
  ("name", "allowed"),
  [
    ("compute_dtype", "auto, float32, bfloat16"),
    ("remat", "none, products, dots, attention, layer_inputs, selected"),
    ("layers", "scanned, unrolled"),
  ],
)
def test_a_choice_that_is_not_offered_names_those_that_are(tiny_dense, name, allowed):
  with pytest.raises(UserError, match=rf"^model\.{name}='other' is not one of {allowed}$"):
    replace(tiny_dense.model, **{name: "other"})
  for value in allowed.split(", "):
    needs = {"save_activations": ("context",)} if value == "selected" else {}
    assert getattr(replace(tiny_dense.model, **{name: value}, **needs), name) == value


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_kv_heads": 3}, r"model\.num_heads=4 is not divisible by model\.num_kv_heads=3; use 3 or 6"),
    ({"num_kv_heads": 8}, r"model\.num_heads=4 is not divisible by model\.num_kv_heads=8; use 8"),
    ({"head_dim": 5}, r"model\.head_dim=5 is not divisible by rotary pair=2; use 4 or 6"),
    (
      {"num_layers": 3, "moe": replace(MOE, every=2)},
      r"model\.num_layers=3 is not divisible by moe\.every=2; use 2 or 4",
    ),
    (
      {"num_layers": 2, "moe": replace(MOE, every=3)},
      r"moe\.every=3 is more than model\.num_layers=2, so no layer would be sparse; lower moe\.every or .*",
    ),
  ],
  ids=["heads in groups", "fewer heads than groups", "odd heads", "half a period", "no whole period"],
)
def test_what_does_not_divide_is_refused_with_both_numbers_and_the_nearest_that_does(tiny_dense, fields, message):
  with pytest.raises(UserError, match=f"^{message}$"):
    replace(tiny_dense.model, **fields)


def test_a_type_of_gradients_that_is_that_of_activations_anyway_is_refused(tiny_dense):
  assert replace(tiny_dense.model, compute_dtype="bfloat16", gradient_dtype="compute").gradient_dtype == "compute"
  with pytest.raises(UserError, match=r"^model\.gradient_dtype='compute' has no effect with model\.compute_dtype="):
    replace(tiny_dense.model, compute_dtype="float32", gradient_dtype="compute")
