"""Held-out scores: sums over documents, ratio errors."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from training_fixtures import fresh_state, random_batch, spec_of, tiny

from moejax.config import Mesh
from moejax.evaluation.held_out import HeldOut, make_scorer, score_documents


def held_out(nats, correct=(3.0, 1.0), targets=(4.0, 4.0), text_bytes=(5.0, 3.0)):
  return HeldOut(*(np.array(values, float) for values in (nats, correct, targets, text_bytes)))


def test_bits_per_byte_and_accuracy_are_ratios_of_sums():
  scores = held_out(nats=(4 * np.log(2.0), 12 * np.log(2.0))).summary()
  assert scores["bits_per_byte"] == pytest.approx(2.0)
  assert scores["accuracy"] == pytest.approx(0.5)


def test_standard_errors_are_those_of_a_ratio_over_documents():
  """Two documents with residuals of d on either side of the ratio: sqrt(2 / 1 x 2 d^2) / total = 2 d / total."""
  one = held_out(nats=(4 * np.log(2.0), 12 * np.log(2.0)))
  scores = one.summary()
  assert scores["bits_per_byte_stderr"] == pytest.approx(2 * 6 / 8)  # 4 - 2 x 5 and 12 - 2 x 3
  assert scores["accuracy_stderr"] == pytest.approx(2 * 1 / 8)


def test_a_summary_counts_targets_and_the_documents_that_have_any():
  scores = held_out(nats=(1.0, 0.0, 2.0), correct=(1.0, 0.0, 1.0), targets=(4.0, 0.0, 3.0), text_bytes=(4.0, 0.0, 9.0))
  summary = scores.summary()
  assert (summary["targets"], summary["documents"]) == (7, 2)
  assert summary["accuracy"] == pytest.approx(2 / 7) and summary["bits_per_byte"] == pytest.approx(3 / 13 / np.log(2.0))


def test_scores_survive_saving(tmp_path):
  held_out((1.0, 2.0)).save(tmp_path / "scores.npz")
  assert HeldOut.load(tmp_path / "scores.npz").summary() == held_out((1.0, 2.0)).summary()


@pytest.mark.parametrize("mesh", [Mesh(data=1), Mesh(data=2, expert=2, model=2)], ids=str)
def test_documents_are_scored_by_their_own_weighted_targets(mesh):
  experiment = tiny(True, mesh=mesh)
  spec = spec_of(experiment)
  parameters = fresh_state(experiment).parameters
  batch = random_batch(experiment)
  batch["documents"] = np.where(batch["segments"] > 0, batch["segments"] - 1, -1)
  byte_lengths = np.arange(264) % 5  # of tokens that follow one another it differs
  scores = score_documents(spec, parameters, [batch, batch], byte_lengths, make_scorer(spec))
  expected_targets = [2 * np.sum((batch["documents"] == d) & (batch["weights"] > 0)) for d in range(3)]
  np.testing.assert_array_equal(scores.targets, expected_targets)

  @jax.jit
  def logits(parameters, *inputs):
    model = spec.model.module(parameters)
    return model.logits(model(*inputs)[0].reshape(-1, 32))

  logits_MV = np.asarray(logits(parameters, *(batch[name] for name in ("tokens", "segments", "positions"))), np.float64)
  targets_M, weights_M = batch["targets"].reshape(-1), batch["weights"].reshape(-1)
  nats_M = np.log(np.exp(logits_MV).sum(-1)) - logits_MV[np.arange(len(targets_M)), targets_M]
  expected = 2 * np.bincount(np.maximum(batch["documents"].reshape(-1), 0), nats_M * weights_M, 3)
  np.testing.assert_allclose(scores.nats, expected, rtol=1e-4)
  text_bytes_M = byte_lengths[targets_M] * weights_M
  np.testing.assert_array_equal(
    scores.text_bytes, 2 * np.bincount(np.maximum(batch["documents"].reshape(-1), 0), text_bytes_M, 3)
  )
  correct_M = (np.argmax(logits_MV, axis=-1) == targets_M) * weights_M
  np.testing.assert_array_equal(
    scores.correct, 2 * np.bincount(np.maximum(batch["documents"].reshape(-1), 0), correct_M, 3)
  )
  assert jax.device_count() == 8
