"""Sparse inference of a model that was trained with all experts: which experts count, and what is refused."""

import dataclasses
import functools
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from inference_fixtures import DENSE, ONE, SPARSE, full_logits, make

from moejax.config import DATA_EXPERT_MODEL, DenseRouter, MoE, Router
from moejax.errors import UserError
from moejax.inference.dropless import inference_model
from moejax.inference.sparse import Sparse, parse_sparse, sparse_model
from moejax.partitioning import make_partitioner

MOE = MoE(num_experts=4, experts_per_token=4, d_ff=16, router=DenseRouter(), dispatch="dense")
DS_MOE = dataclasses.replace(DENSE, attention_experts=2, moe=MOE)
ROWS = np.random.default_rng(0).integers(0, 40, (4, 9)).tolist()


@pytest.fixture(scope="module")
def logits():
  """The logits in a sparse mode, None for all experts."""
  model, parameters = make(DS_MOE)

  @functools.cache
  def of(text):
    sparse = None if text is None else parse_sparse(text)
    return full_logits(inference_model(DS_MOE, model.partitioner, sparse), parameters, ROWS)

  return of


@pytest.mark.parametrize(("everything", "fewer"), [("top_k:4", "top_k:2"), ("threshold:1e-6", "threshold:1.0")])
def test_all_experts_give_the_logits_of_the_trained_model_and_fewer_others(logits, everything, fewer):
  np.testing.assert_allclose(logits(everything), logits(None), rtol=1e-4, atol=1e-5)
  assert np.abs(logits(fewer) - logits(None)).max() > 1e-2


def test_a_mode_is_a_name_and_perhaps_a_number():
  assert parse_sparse("top_k:4") == Sparse("top_k", 4.0)
  assert parse_sparse("threshold") == Sparse("threshold", 0.48)
  assert str(parse_sparse("threshold_top_k:0.9")) == "threshold_top_k:0.9"
  assert sparse_model(DS_MOE, parse_sparse("threshold_top_k")).moe.router.equal_counts


def test_each_value_has_a_name_and_a_folder_of_its_own():
  values = [0.48, 0.4800001, 0.1 + 0.2, 0.3, 1.0, 1000000.0, 1000001.0]
  modes = [Sparse("threshold", value) for value in values]
  assert len({mode.folder for mode in modes}) == len({str(mode) for mode in modes}) == len(values)
  assert all(parse_sparse(str(mode)) == mode for mode in modes)
  assert modes[0].folder == "sparse/threshold_0.48" and modes[4].folder == "sparse/threshold_1"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("best", "sparse mode 'best' has no number after the colon"),
    ("best:4", "sparse mode 'best' is not one of threshold, top_k, threshold_top_k, skip"),
    (
      "top_k",
      "sparse mode 'top_k' has no number after the colon; use threshold:0.48, top_k:4, "
      "threshold_top_k:0.48 or skip:0.5",
    ),
    ("top_k:1.5", "the value of sparse mode top_k:1.5 must be an integer"),
    ("top_k:5", "sparse mode top_k:5 is more than moe.num_experts=4"),
    ("threshold:0", "the value of sparse mode threshold:0 must be above 0"),
    ("threshold:nan", "the value of sparse mode threshold:nan must be above 0"),
    ("skip", "sparse mode 'skip' has no number after the colon"),
    ("skip:1.5", "the value of sparse mode skip:1.5 must be at most 1, a ratio of weights"),
    (
      "skip:0.5",
      "sparse mode skip:0.5 is for models with router.kind='top_k' .*, and this one has router.kind='d",
    ),
    ("top_k:inf", "the value of sparse mode top_k:inf must be an integer"),
  ],
)
def test_what_is_no_mode_is_refused(text, message):
  with pytest.raises(UserError, match=f"^{message}"):
    sparse_model(DS_MOE, parse_sparse(text))


@pytest.mark.parametrize(("model", "has"), [(DENSE, "no sparse layers"), (SPARSE, r"router.kind='top_k'")])
def test_only_a_model_that_was_trained_with_all_experts_has_modes(model, has):
  partitioner = make_partitioner(ONE, DATA_EXPERT_MODEL)
  with pytest.raises(UserError, match=f"router.kind='dense' .*, and this one has {has}"):
    inference_model(model, partitioner, Sparse("top_k", 2.0))


def test_skipping_changes_only_tokens_with_a_choice_below_the_ratio_and_1_keeps_only_the_best():
  top_k = dataclasses.replace(SPARSE.moe, router=Router(renormalize=True), every=1, num_experts=4, experts_per_token=2)
  config = dataclasses.replace(DENSE, moe=top_k, num_layers=1)
  model, parameters = make(config)

  def of(text):
    sparse = None if text is None else parse_sparse(text)
    return full_logits(inference_model(config, model.partitioner, sparse), parameters, ROWS)

  ours, nearly_all, some, one = (of(text) for text in (None, "skip:1e-6", "skip:0.4", "skip:1"))
  np.testing.assert_allclose(nearly_all, ours, rtol=1e-5, atol=1e-6)
  skipped = np.abs(some - ours).max(-1) > 1e-4
  assert 0 < skipped.mean() < 1
  # One layer: a token with a skipped choice has only its best expert, and any other has both.
  np.testing.assert_allclose(some[skipped], one[skipped], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(some[~skipped], ours[~skipped], rtol=1e-3, atol=2e-4)
