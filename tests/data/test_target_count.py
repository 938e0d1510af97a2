"""Counts of real targets against the weights of the very batches that training reads."""

from dataclasses import replace

import numpy as np
import pytest

from moejax.config.parameters import budget_tokens, full_sequence_steps
from moejax.data import target_count
from moejax.data.best_fit import make_plan
from moejax.data.corpus import Corpus
from moejax.data.mixture import training_mixture
from moejax.data.packing import BestFit, Concatenated
from moejax.data.pipeline import batches_by_step
from moejax.data.target_count import TargetCounter
from moejax.data.tokenizers import ByteTokenizer
from moejax.errors import UserError

PACKINGS = ("concatenate", "best_fit")
LENGTHS = {"short": (2, 9), "of which one fills half a sequence": (17, 22), "longer than a sequence": (20, 90)}
"""Tokens of documents, fewest and most."""


def documents(lengths, random, number=400):
  return [np.arange(length) % 250 for length in random.integers(*lengths, number)]


def weights_of(counter, corpus, experiment, steps):
  """Targets with weight in each of the first batches."""
  mixture = training_mixture(corpus, experiment.data)
  batches = (batches_by_step(mixture, experiment.data, experiment.training.batch_size)[step] for step in range(steps))
  return np.array([np.count_nonzero(batch["weights"]) for batch in batches])


@pytest.fixture
def corpus_of(make_stream, tmp_path):
  """The corpus of some streams of documents."""

  def make(*streams, weights=(), prefixes=None):
    made = tuple(make_stream(*texts, prefixes=prefixes) for texts in streams)
    return Corpus(made, weights, made[0], ByteTokenizer(), tmp_path)

  return make


@pytest.fixture
def experiment(tiny_dense):
  """Of sequences of 32 and batches of 8."""
  budget = replace(tiny_dense.training.budget, tokens_per_parameter=1.5)
  return replace(tiny_dense, training=replace(tiny_dense.training, budget=budget))


def test_the_count_of_a_window_is_the_sum_of_its_weights(make_stream):
  random = np.random.default_rng(0)
  counted = 0
  for trial in range(60):
    texts = documents((1, 40), random, number=random.integers(3, 30))
    prefixes = [int(random.integers(0, len(text) + 3)) for text in texts] if trial % 2 else None
    stream, length = make_stream(*texts, prefixes=prefixes), int(random.integers(1, 20))
    for windows in (Concatenated(stream, length), BestFit(stream, length, make_plan(stream.starts, length))):
      indices = random.permutation(len(windows))
      expected = [np.count_nonzero(windows[index]["weights"]) for index in indices]
      np.testing.assert_array_equal(windows.num_predicted(indices), expected)
      counted += sum(expected)
  assert counted > 10_000


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("weights", [(), (1.0, 3.0)], ids=["pooled", "weighted"])
def test_a_budget_is_met_in_real_tokens_and_by_no_step_too_many(corpus_of, experiment, packing, lengths, weights):
  random = np.random.default_rng(1)
  experiment = replace(experiment, data=replace(experiment.data, packing=packing, seed=5))
  corpus = corpus_of(documents(lengths, random), documents((3, 60), random), weights=weights)
  counter = TargetCounter(corpus)
  steps, budget = counter.steps(experiment), budget_tokens(experiment.model, experiment.training.budget)
  trained = weights_of(counter, corpus, experiment, steps)
  assert trained.sum() - trained[-1] < budget <= trained.sum()
  assert [counter.tokens(experiment, n) for n in range(steps + 1)] == [0, *np.cumsum(trained)]
  assert steps >= full_sequence_steps(experiment)


def test_half_empty_sequences_take_twice_the_steps(corpus_of, experiment):
  """Documents of 17 inputs, of which no two fit into a sequence of 32."""
  experiment = replace(experiment, data=replace(experiment.data, packing="best_fit"))
  counter = TargetCounter(corpus_of([np.arange(17)] * 50))
  assert counter.tokens(experiment, 10) == 10 * 8 * 17
  assert counter.steps(experiment) == -(-budget_tokens(experiment.model, experiment.training.budget) // (8 * 17)) == 90
  assert full_sequence_steps(experiment) == 48


def test_steps_that_are_set_stay_and_their_real_tokens_are_counted(corpus_of, experiment):
  experiment = replace(experiment, training=replace(experiment.training, steps=7))
  counter = TargetCounter(corpus_of([np.arange(31)] * 50))  # with its BEGIN, a document a sequence
  assert counter.steps(experiment) == 7
  # 31 of 32 targets have weight: the 32nd is the next document's BEGIN.
  assert counter.tokens(experiment, 7) == 7 * 8 * 31


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_beyond_those_looked_up_count_as_the_mean_of_all(corpus_of, experiment, packing, monkeypatch):
  monkeypatch.setattr(target_count, "EXACT_ROWS", 64)
  experiment = replace(experiment, data=replace(experiment.data, packing=packing))
  corpus = corpus_of(documents((3, 40), np.random.default_rng(2)))
  counter = TargetCounter(corpus)
  trained = weights_of(counter, corpus, experiment, 100)
  assert counter.tokens(experiment, 8) == trained[:8].sum()
  assert counter.tokens(experiment, 100) == pytest.approx(trained.sum(), rel=0.005)
  budget = budget_tokens(experiment.model, experiment.training.budget)
  assert counter.tokens(experiment, counter.steps(experiment)) >= budget - 1
  assert counter.steps(experiment) == pytest.approx(np.searchsorted(np.cumsum(trained), budget) + 1, abs=1)


def test_text_of_which_all_is_given_is_refused(corpus_of, experiment, monkeypatch):
  monkeypatch.setattr(target_count, "EXACT_ROWS", 64)
  with pytest.raises(UserError, match="no token to predict"):
    TargetCounter(corpus_of([np.arange(20)] * 10, prefixes=[20] * 10)).steps(experiment)
