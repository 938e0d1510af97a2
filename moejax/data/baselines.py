"""Unigram and bigram models, as a baseline for the scores of trained models."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from moejax.data.corpus import Corpus
from moejax.data.packing import evaluation_window, num_evaluation_windows
from moejax.data.ratio_estimate import ratio, ratio_stderr
from moejax.data.token_stream import TokenStream

_CHUNK = 2**20
_DENSE = 2**24


def ngram_baselines(corpus: Corpus, max_tokens: int | None = None) -> dict[str, float | None]:
  """Bits per byte and next-token accuracy of a unigram and a bigram model.

  Both are estimated from the training streams, independently of their weights, and evaluated on exactly the targets
  that evaluation uses: those of weight 1 among the first `max_tokens` of the validation stream. The unigram adds one to
  every count. The bigram interpolates with the unigram by Witten-Bell smoothing (Witten and Bell 1991, IEEE
  Transactions on Information Theory 37(4), method C; in Chen and Goodman 1998, TR-10-98, section 2.4): with n(c) the
  count of context c and t(c) its distinct followers, p(w | c) = (n(c, w) + t(c) p(w)) / (n(c) + t(c)). The prediction
  is the most probable token, with the lowest id if there are several.

  Returns:
    MODEL_bits_per_byte and MODEL_accuracy for MODEL in unigram and bigram, and their standard errors with the suffix
    _stderr (over documents, as ratio estimates; None if there is only one document).
  """
  model = _count(corpus.train, corpus.tokenizer.vocab_size)
  byte_lengths = corpus.tokenizer.byte_lengths
  scores = {name: np.zeros(corpus.validation.num_documents) for name in ("tokens", "bytes", *_SCORES)}
  for contexts, targets, documents in _scored(corpus.validation, max_tokens):
    values = _score(model, contexts, targets) | {"tokens": np.ones(len(targets)), "bytes": byte_lengths[targets]}
    for name, value in values.items():
      scores[name] += np.bincount(documents, weights=value, minlength=len(scores[name]))
  result: dict[str, float | None] = {}
  for name, denominator in _SCORES.items():
    stderr = ratio_stderr(scores[name], scores[denominator])
    result[name] = ratio(scores[name], scores[denominator])
    result[f"{name}_stderr"] = stderr if np.isfinite(stderr) else None
  return result


_SCORES = {
  "unigram_bits_per_byte": "bytes",
  "bigram_bits_per_byte": "bytes",
  "unigram_accuracy": "tokens",
  "bigram_accuracy": "tokens",
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Bigrams:
  """Counts and probabilities of V ids and U distinct pairs."""

  pairs: np.ndarray
  """int64 [U], sorted: context * V + follower."""
  counts: np.ndarray
  """int64 [U]: n(c, w)."""
  unigram: np.ndarray
  """float64 [V]: p(w)."""
  totals: np.ndarray
  """float64 [V]: n(c)."""
  followers: np.ndarray
  """float64 [V]: t(c)."""
  best: np.ndarray
  """int64 [V]: the most probable follower of each context."""


def _scored(stream: TokenStream, max_tokens: int | None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Inputs, targets and documents of targets with weight 1, in chunks."""
  for index in range(num_evaluation_windows(stream, _CHUNK, max_tokens)):
    window = evaluation_window(stream, index, _CHUNK, max_tokens)
    scored = window["weights"] > 0
    yield window["tokens"][scored], window["targets"][scored], window["documents"][scored]


def _count(streams: Sequence[TokenStream], V: int) -> _Bigrams:
  unigrams = np.zeros(V, np.int64)
  pairs = counts = np.zeros(0, np.int64)
  for contexts, targets, _ in itertools.chain.from_iterable(_scored(stream, None) for stream in streams):
    unigrams += np.bincount(targets, minlength=V)
    new_pairs, new_counts = _distinct(contexts.astype(np.int64) * V + targets, V * V)
    pairs, where = np.unique(np.r_[pairs, new_pairs], return_inverse=True)
    # Float64 sums of counts are exact below 2**53.
    counts = np.bincount(where, weights=np.r_[counts, new_counts]).astype(np.int64)
  unigram = (unigrams + 1) / (unigrams.sum() + V)
  contexts = pairs // V
  totals = np.bincount(contexts, weights=counts, minlength=V)
  followers = np.bincount(contexts, minlength=V).astype(np.float64)
  best = _best_followers(pairs, counts, unigram, followers)
  return _Bigrams(pairs, counts, unigram, totals, followers, best)


def _distinct(codes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
  """The distinct codes below `size`, sorted, and their counts."""
  if size > _DENSE:
    return np.unique(codes, return_counts=True)
  counts = np.bincount(codes)  # twenty times as fast as sorting, if the table is small
  distinct = np.flatnonzero(counts)
  return distinct, counts[distinct]


def _best_followers(pairs: np.ndarray, counts: np.ndarray, unigram: np.ndarray, followers: np.ndarray) -> np.ndarray:
  """int64 [V]: argmax of p(w | c), either the best observed follower or the best unigram."""
  V = len(unigram)
  contexts, tokens = pairs // V, pairs % V
  seen = counts + followers[contexts] * unigram[tokens]
  top = int(unigram.argmax())
  pairs, seen = np.r_[pairs, np.arange(V) * V + top], np.r_[seen, followers * unigram[top]]
  order = np.lexsort((pairs, -seen, pairs // V))
  _, first = np.unique((pairs // V)[order], return_index=True)
  return (pairs % V)[order[first]]


def _score(model: _Bigrams, contexts: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
  """The four scores of each target [n]."""
  unigram = model.unigram[targets]
  pair = contexts.astype(np.int64) * len(model.unigram) + targets
  at = np.minimum(np.searchsorted(model.pairs, pair), len(model.pairs) - 1)
  count = np.where(model.pairs[at] == pair, model.counts[at], 0)
  total, followers = model.totals[contexts], model.followers[contexts]
  seen = total > 0
  interpolated = (count + followers * unigram) / np.where(seen, total + followers, 1)
  return {
    "unigram_bits_per_byte": -np.log2(unigram),
    "bigram_bits_per_byte": -np.log2(np.where(seen, interpolated, unigram)),
    "unigram_accuracy": targets == model.unigram.argmax(),
    "bigram_accuracy": targets == model.best[contexts],
  }
