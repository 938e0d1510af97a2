import collections
import json
import math

import numpy as np
import pytest

from moejax.config import Data
from moejax.data import baselines
from moejax.data.baselines import ngram_baselines
from moejax.data.corpus import Corpus, build_corpus
from moejax.data.pipeline import evaluation_batches
from moejax.data.text import open_text
from moejax.data.token_stream import TokenStream
from moejax.data.tokenizers import ByteTokenizer


@pytest.fixture
def corpus(tmp_path):
  text = (
    "the cat sat on the mat", "a dog and a cat", "the end of the day", "abracadabra", "zebra", "on and on and on",
    "größer als groß", "the théâtre", "xyzzy", "mat the cat", "dogs sat", "a day on the mat",
  )  # fmt: skip
  for split, part in (("train", text[:8]), ("validation", text[8:])):
    (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in part))
  train, validation = (str(tmp_path / f"{split}.jsonl") for split in ("train", "validation"))
  return build_corpus(open_text(Data(train=(train,), validation=(validation,), sequence_length=8)), tmp_path / "cache")


@pytest.fixture
def large_vocabulary():
  """Zipf-like ids of a vocabulary of 50,000, so that pairs are counted sparsely; an id stands for 0 to 6 bytes."""

  class Large(ByteTokenizer):
    vocab_size = 50_000
    begin = 49_998
    byte_lengths = np.arange(50_000) % 7

  generator = np.random.default_rng(0)

  def stream(sizes):
    documents = [np.r_[Large.begin, generator.zipf(1.3, size) % 49_000] for size in sizes]
    return TokenStream(np.concatenate(documents), np.cumsum([0, *map(len, documents)]), Large.padding)

  return Corpus((stream([40, 300]), stream([1, 60])), (), stream([30, 200, 2]), Large(), None)


def pairs(stream, max_tokens=None):
  """(context, target) of each token that is not the first of its document."""
  starts = set(stream.starts.tolist())
  stop = len(stream) if max_tokens is None else min(len(stream), max_tokens + 1)
  return [(int(stream.tokens[i - 1]), int(stream.tokens[i])) for i in range(1, stop) if i not in starts]


def plain(corpus, max_tokens):
  """The same by loops, straight from the definitions."""
  V = corpus.tokenizer.vocab_size
  train = [pair for stream in corpus.train for pair in pairs(stream)]
  unigrams, bigrams = collections.Counter(w for _, w in train), collections.Counter(train)
  totals, followers = collections.Counter(c for c, _ in train), collections.Counter(c for c, _ in bigrams)

  def p(w):
    return (unigrams[w] + 1) / (len(train) + V)

  def p_after(c, w):
    return (bigrams[c, w] + followers[c] * p(w)) / (totals[c] + followers[c]) if totals[c] else p(w)

  candidates = sorted(unigrams)
  scored = pairs(corpus.validation, max_tokens)
  num_bytes = sum(int(corpus.tokenizer.byte_lengths[w]) for _, w in scored)
  top = max(candidates, key=p)
  best = {c: max(candidates, key=lambda w, c=c: p_after(c, w)) for c in {c for c, _ in scored}}
  assert sum(p(w) for w in range(V)) == pytest.approx(1)
  assert sum(p_after(scored[0][0], w) for w in range(V)) == pytest.approx(1)
  return {
    "unigram_bits_per_byte": -sum(math.log2(p(w)) for _, w in scored) / num_bytes,
    "bigram_bits_per_byte": -sum(math.log2(p_after(c, w)) for c, w in scored) / num_bytes,
    "unigram_accuracy": sum(w == top for _, w in scored) / len(scored),
    "bigram_accuracy": sum(w == best[c] for c, w in scored) / len(scored),
  }


@pytest.mark.parametrize("name", ["corpus", "large_vocabulary"])
@pytest.mark.parametrize("max_tokens", [None, 25])
def test_scores_are_those_of_plain_loops(request, name, max_tokens):
  corpus = request.getfixturevalue(name)
  expected = plain(corpus, max_tokens)
  result = ngram_baselines(corpus, max_tokens)
  assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-12)
  assert expected["bigram_accuracy"] > 0


@pytest.mark.parametrize("name", ["corpus", "large_vocabulary"])
def test_chunks_make_no_difference(request, name, monkeypatch):
  corpus = request.getfixturevalue(name)
  whole = ngram_baselines(corpus)
  monkeypatch.setattr(baselines, "_CHUNK", 7)
  assert ngram_baselines(corpus) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("max_tokens", [None, 25])
@pytest.mark.parametrize("sequence_length", [4, 9, 64])
def test_the_scored_targets_are_those_of_evaluation(corpus, sequence_length, max_tokens):
  batches = evaluation_batches(corpus.validation, sequence_length, 2, max_tokens)
  of_evaluation = [
    pair
    for batch in batches
    for pair in zip(batch["tokens"][batch["weights"] > 0], batch["targets"][batch["weights"] > 0], strict=True)
  ]
  (chunk,) = baselines._scored(corpus.validation, max_tokens)
  assert of_evaluation == list(zip(chunk[0], chunk[1], strict=True)) == pairs(corpus.validation, max_tokens)


def test_a_prediction_that_no_context_was_seen_with_may_win():
  """After the context 1 came 20 different tokens once each; the unigram 5 is so common that it is the better guess."""
  pairs_seen = np.r_[259 + np.arange(20) + 100, [2 * 259 + 5] * 500]
  distinct, counts = baselines._distinct(pairs_seen, 259 * 259)
  unigram = np.bincount(pairs_seen % 259, minlength=259) + 1.0
  followers = np.bincount(distinct // 259, minlength=259).astype(float)
  best = baselines._best_followers(distinct, counts, unigram / unigram.sum(), followers)
  assert (best[1], best[2]) == (5, 5)


def test_a_corpus_that_repeats_itself_is_easy(tmp_path):
  (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "abcd" * (2000 + n)}) for n in range(20)))
  data = Data(train=(str(tmp_path / "a.jsonl"),), validation_fraction=0.3, sequence_length=8)
  result = ngram_baselines(build_corpus(open_text(data), tmp_path / "cache"))
  assert result["unigram_bits_per_byte"] == pytest.approx(2.0, abs=0.05)
  assert result["bigram_bits_per_byte"] < 0.01
  assert result["bigram_accuracy"] == pytest.approx(1.0, abs=0.01)
