"""Generation: every step equals the full forward pass, stop conditions, sampling, on one device and on eight."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from inference_fixtures import DENSE, EIGHT, ONE, SPARSE, full_logits, make

import moejax.inference.generate
from moejax.config import (
  DenseRouter,
  EinsumDispatch,
  GroupedQuery,
  Mesh,
  MoE,
  Router,
  ThresholdDepths,
  ThresholdRouter,
  TopKDepths,
  TopPRouter,
)
from moejax.inference.cache import cache_shardings, empty_cache, extend
from moejax.inference.generate import Generator, _chunks
from moejax.inference.sampling import Sampling


def sparse(router, **fields):
  return dataclasses.replace(SPARSE, moe=dataclasses.replace(SPARSE.moe, router=router, **fields))


MODELS = {
  "dense, grouped queries, scanned": DENSE,
  "experts of heads, untied, capped, unrolled": dataclasses.replace(
    DENSE, tie_embeddings=False, logit_cap=3.0, qk_norm=True, layers="unrolled", attention_experts=2
  ),
  "sparse, qk-norm, scanned": SPARSE,
  "experts above a threshold, scanned": dataclasses.replace(
    SPARSE,
    attention_experts=2,
    num_kv_heads=2,
    moe=dataclasses.replace(SPARSE.moe, router=ThresholdRouter(threshold=0.9), experts_per_token=4),
  ),
  "DS-MoE": dataclasses.replace(
    DENSE,
    attention_experts=2,
    moe=MoE(num_experts=4, experts_per_token=4, d_ff=16, router=DenseRouter(), dispatch="dense"),
  ),
  "experts up to a probability": sparse(TopPRouter(threshold=0.6), experts_per_token=3),
  "experts by biased sigmoid scores, some skipped": sparse(
    Router(scores="sigmoid", bias_rate=0.1, scale=2.0, skip_below=0.7), experts_per_token=3
  ),
  "experts of the best groups": sparse(Router(expert_groups=2, groups_per_token=1)),
  "tokens that skip layers by a threshold": dataclasses.replace(
    DENSE, depths=ThresholdDepths(every=1, share=0.25, threshold=0.45)
  ),
  "tokens that skip layers as predicted, windows, unrolled, modules": dataclasses.replace(
    DENSE,
    depths=TopKDepths(every=2, share=0.5),
    attention=(GroupedQuery(window=3),),
    layers="unrolled",
    multi_token_depth=1,
  ),
  "experts of the tokens that do not skip layers": dataclasses.replace(
    DENSE,
    depths=TopKDepths(every=2, share=0.5),
    moe=MoE(num_experts=4, experts_per_token=2, d_ff=16, dispatch=EinsumDispatch(priority="token")),
  ),
  "sparse, shared expert, unrolled": dataclasses.replace(
    SPARSE,
    layers="unrolled",
    moe=dataclasses.replace(SPARSE.moe, num_shared_experts=1, dispatch=EinsumDispatch(priority="token")),
  ),
}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], [8], [4, 6, 2]]


def never(ids):
  return False


@functools.cache
def of_one_device(name, rows):
  """The logits of whole sequences on one device, without a cache."""
  return full_logits(*make(MODELS[name]), rows)


FOUR = Mesh(data=2, model=4)
"""More devices along model than there are key/value heads."""


ON_ONE = (
  "experts up to a probability", "experts by biased sigmoid scores, some skipped", "experts of the best groups",
  "sparse, shared expert, unrolled",
)  # fmt: skip
"""Whose choices lie on devices as those of other sparse models do."""


@pytest.mark.parametrize(
  ("name", "mesh", "rules"),
  [
    *(pytest.param(name, ONE if name in ON_ONE else EIGHT, {}, marks=pytest.mark.slow) for name in MODELS),
    *(pytest.param(name, EIGHT, {}, marks=pytest.mark.nightly) for name in ON_ONE[:3]),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ("dense, grouped queries, scanned", FOUR, {}),
        ("dense, grouped queries, scanned", FOUR, {"heads": (), "kv_heads": (), "head_dim": ("model",)}),
        ("dense, grouped queries, scanned", EIGHT, {"heads": ()}),
        ("experts of heads, untied, capped, unrolled", FOUR, {"kv_heads": ()}),
        ("sparse, qk-norm, scanned", EIGHT, {"kv_heads": ("expert", "model"), "embed": ("data",), "batch": ("data",)}),
      )
    ),
  ],
  ids=str,
)
def test_prefill_and_every_decoded_token_have_the_logits_of_one_device_without_a_cache(name, mesh, rules):
  abstract, parameters = make(MODELS[name], mesh, **rules)
  random = np.random.default_rng(1)
  starts, new = [5, 12, 1, 3], 6
  rows = [random.integers(0, 40, start + new).tolist() for start in starts]
  expected = of_one_device(name, tuple(map(tuple, rows)))

  @jax.jit
  def run(parameters, tokens_BT, counts_B, cache):
    model = abstract.module(parameters)
    x_BTD, cache = extend(model, tokens_BT, counts_B, cache)
    return model.logits(x_BTD.reshape(-1, x_BTD.shape[-1])).reshape(*tokens_BT.shape, -1), cache

  tokens_BT = np.array([row[:start] + [0] * (12 - start) for row, start in zip(rows, starts, strict=True)], np.int32)
  cache = jax.device_put(empty_cache(abstract, 4, 20), cache_shardings(abstract, 4))
  got, cache = run(parameters, tokens_BT, np.array(starts, np.int32), cache)
  for row, start in enumerate(starts):
    np.testing.assert_allclose(got[row, :start], expected[row, :start], rtol=2e-4, atol=2e-5)
  for step in range(new):
    token_B1 = np.array([[row[start + step]] for row, start in zip(rows, starts, strict=True)], np.int32)
    got, cache = run(parameters, token_B1, np.ones(4, np.int32), cache)
    for row, start in enumerate(starts):
      np.testing.assert_allclose(got[row, 0], expected[row, start + step], rtol=2e-4, atol=2e-5)
  np.testing.assert_array_equal(cache.lengths_B, np.array(starts) + new)


@pytest.mark.parametrize(
  "name",
  [pytest.param("dense, grouped queries, scanned", marks=pytest.mark.slow), "sparse, shared expert, unrolled"],
)
def test_every_token_of_a_continuation_is_the_best_after_what_is_before_it(name):
  abstract, parameters = make(MODELS[name], EIGHT)
  new = dict(Generator(abstract, batch_size=4, vocab_size=38).generate(parameters, PROMPTS, [never] * 4, max_new=5))
  rows = [prompt + new[i] for i, prompt in enumerate(PROMPTS)]
  best = full_logits(abstract, parameters, rows)[..., :38].argmax(-1)
  for i, prompt in enumerate(PROMPTS):
    assert best[i, len(prompt) - 1 : len(prompt) + 4].tolist() == new[i]
  assert len({tuple(ids) for ids in new.values()}) > 1  # the prompts differ in what follows


def test_each_prompt_stops_by_its_own_condition_and_the_others_go_on():
  abstract, parameters = make(DENSE)
  free = dict(Generator(abstract, 3, 40).generate(parameters, PROMPTS, [never] * 4, max_new=8))
  stops = [lambda ids, n=n: len(ids) == n for n in (1, 8, 3, 20)]
  stopped = dict(Generator(abstract, 3, 40).generate(parameters, PROMPTS, stops, max_new=8))
  assert stopped == {i: ids[:n] for (i, ids), n in zip(sorted(free.items()), (1, 8, 3, 8), strict=True)}


def test_the_cache_is_donated_and_no_length_of_a_prompt_compiles_another_program():
  model, parameters = make(DENSE)
  generator = Generator(model, 4, 40)
  for length in range(1, 25):
    list(generator.generate(parameters, [[3] * length, [1]], [never] * 2, max_new=2))
  # 16 tokens with 24 slots, 24 tokens with 32 slots
  assert generator._prefill._cache_size() == generator._decode._cache_size() == 2
  ones_B, keys_B = np.ones(4, np.int32), jax.random.split(jax.random.key(0), 4)
  for program, arrays in (
    (generator._prefill, (np.ones((4, 16), np.int32), ones_B, ones_B, keys_B)),
    (generator._decode, (ones_B, ones_B, keys_B, np.int32(1))),
  ):
    cache = generator._empty(24)
    program(parameters, cache, *arrays)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache.layers))


def test_a_prompt_in_chunks_has_the_continuation_of_one_that_is_computed_at_once(monkeypatch):
  model, parameters = make(SPARSE)
  prompts = [(PROMPTS[1] * 4)[:length] for length in (48, 33, 17, 5)]
  whole = dict(Generator(model, 4, 40).generate(parameters, prompts, [never] * 4, max_new=5))
  monkeypatch.setattr(moejax.inference.generate, "CHUNK", 16)
  assert _chunks(48) == [16, 16, 16] and _chunks(33) == [16, 16, 16] and _chunks(17) == [16, 16]
  assert dict(Generator(model, 4, 40).generate(parameters, prompts, [never] * 4, max_new=5)) == whole


def test_every_token_is_seen_as_it_comes_and_each_prompt_has_a_limit_of_its_own():
  model, parameters = make(DENSE)
  seen = []
  generated = dict(
    Generator(model, 2, 40).generate(
      parameters, PROMPTS, [never] * 4, [1, 2, 3, 4], observe=lambda i, ids: seen.append((i, len(ids), ids[-1]))
    )
  )
  assert {i: len(ids) for i, ids in generated.items()} == {0: 1, 1: 2, 2: 3, 3: 4}
  assert sorted(seen) == [(i, n + 1, ids[n]) for i, ids in sorted(generated.items()) for n in range(len(ids))]


def test_a_sample_depends_on_the_seed_and_the_index_of_its_prompt_alone():
  abstract, parameters = make(DENSE)
  prompts, sampling = [*PROMPTS, PROMPTS[2], PROMPTS[2]], Sampling(temperature=1.5)

  def samples(batch_size, prompts=prompts, seed=0):
    generator = Generator(abstract, batch_size, 40, sampling)
    return dict(generator.generate(parameters, prompts, [never] * len(prompts), 6, seed))

  drawn = samples(4)
  assert drawn == samples(4) != samples(4, seed=1)
  assert drawn == samples(2)
  others = [prompt if i == 2 else [7] * 20 for i, prompt in enumerate(prompts)]
  assert samples(4, others)[2] == drawn[2]
  assert len({tuple(drawn[i]) for i in (2, 4, 5)}) == 3  # equal prompts
