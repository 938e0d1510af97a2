"""Log-likelihoods against the full forward pass, and which tokens a window predicts from what."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from inference_fixtures import DENSE, EIGHT, ONE, SPARSE, full_logits, make

from moejax.errors import UserError
from moejax.inference.score import Scorer, windows


def predictions(context, continuation, max_length):
  """What each window predicts, and from what: {index in the whole: tokens seen}."""
  whole = [*context, *continuation]
  seen = {}
  for window in windows(context, continuation, max_length):
    at = next(i for i in range(len(whole)) if whole[i : i + len(window.tokens)] == window.tokens)
    for offset in range(len(window.tokens) - window.scored, len(window.tokens)):
      assert at + offset not in seen
      seen[at + offset] = window.tokens[:offset]
  return seen


@pytest.mark.parametrize("context, continuation", [(1, 1), (1, 8), (5, 3), (20, 8), (1, 9), (3, 16), (1, 17), (30, 25)])
def test_each_token_of_the_continuation_is_predicted_once_from_no_more_than_fits(context, continuation):
  ids = list(range(context + continuation))
  seen = predictions(ids[:context], ids[context:], max_length=8)
  assert sorted(seen) == ids[context:]
  for i, tokens in seen.items():
    assert 1 <= len(tokens) <= 8 and tokens == ids[i - len(tokens) : i]
  if continuation <= 8:  # in one window, and all the context that fits
    assert len(seen[context]) == min(context, 9 - continuation)
  assert len(seen[ids[-1]]) == min(len(ids) - 1, 8)


def test_long_texts_roll_as_the_harness_documents_it():
  """`lm_eval.api.model.LM.loglikelihood_rolling`: tokens 0 to 9 after BOS, at most 4 of context."""
  rolled = windows([99], list(range(10)), 4)
  assert [window.tokens for window in rolled] == [[99, 0, 1, 2, 3], [3, 4, 5, 6, 7], [5, 6, 7, 8, 9]]
  assert [window.scored for window in rolled] == [4, 4, 2]


@pytest.mark.parametrize(
  "model, mesh", [(DENSE, ONE), pytest.param(SPARSE, EIGHT, marks=pytest.mark.slow)], ids=["dense", "sparse on a mesh"]
)
def test_scores_are_those_of_the_full_forward_pass_and_come_once_each(model, mesh):
  abstract, parameters = make(model, mesh)
  random = np.random.default_rng(2)
  sizes = [(3, 4), (1, 1), (7, 0), (20, 2), (1, 20), (1, 31), (9, 16), (4, 1)]
  pairs = [(random.integers(0, 40, a).tolist(), random.integers(0, 40, b).tolist()) for a, b in sizes]
  pairs[7] = (pairs[7][0], greedy_token(abstract, parameters, pairs[7][0]))
  got = list(Scorer(abstract, batch_size=4, max_length=16).score(parameters, pairs))
  assert sorted(i for i, _ in got) == list(range(len(pairs)))
  assert dict(got)[2] == (0.0, True) and dict(got)[7][1] and not dict(got)[0][1]
  parts = [(i, part) for i, pair in enumerate(pairs) for part in windows(*pair, 16)]
  rows = [part.tokens for _, part in parts]
  logits_BTV = full_logits(abstract, parameters, rows + [[0]] * (-len(rows) % 4)).astype(np.float64)
  expected = {i: (0.0, True) for i in range(len(pairs))}
  for (i, part), logits_TV in zip(parts, logits_BTV, strict=False):
    for t in range(len(part.tokens) - part.scored, len(part.tokens)):
      logits_V, (score, greedy) = logits_TV[t - 1], expected[i]
      score += logits_V[part.tokens[t]] - np.log(np.exp(logits_V).sum())
      expected[i] = (score, greedy and logits_V.argmax() == part.tokens[t])
  for i, (score, greedy) in got:
    assert score == pytest.approx(expected[i][0], abs=2e-4), pairs[i]
    assert greedy == expected[i][1]


def greedy_token(abstract, parameters, prompt):
  """The one token that greedy decoding adds."""
  return [int(full_logits(abstract, parameters, [prompt] * 4)[0, -1].argmax())]


def test_a_program_is_compiled_for_a_few_lengths_and_not_for_each_example():
  abstract, parameters = make(DENSE)
  scorer = Scorer(abstract, batch_size=4, max_length=64)
  pairs = [([1] * context, [2] * 3) for context in range(1, 60)]
  assert len(list(scorer.score(parameters, pairs))) == 59
  assert len(scorer._programs) == 5  # 16, 24, 32, 48, 64 tokens


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
  with pytest.raises(UserError, match="batch=3 is not divisible by the 4 shards"):
    Scorer(make(DENSE, EIGHT)[0], batch_size=3, max_length=16)
