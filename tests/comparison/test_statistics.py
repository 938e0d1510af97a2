"""Intervals contain the truth as often as they claim, for known distributions."""

import math

import numpy as np
import pytest

from moejax.comparison.statistics import (
  Scores,
  SeedVariance,
  block_length,
  differences,
  geometric_mean,
  seed_variance,
  variance_of_mean,
)

TRIALS = 300
CERTAIN_SEEDS = SeedVariance(0.0, 1)


def autoregressive(random, size: int, correlation: float, deviation: float) -> np.ndarray:
  """Noise whose successive values are correlated."""
  steps = random.normal(size=size) * deviation * math.sqrt(1 - correlation**2)
  values = [random.normal() * deviation]
  for step in steps[1:]:
    values.append(correlation * values[-1] + step)
  return np.array(values)


def coverage(make, truth: float = 1.0) -> float:
  found = [geometric_mean(make()) for _ in range(TRIALS)]
  return float(np.mean([estimate.low <= truth <= estimate.high for estimate in found]))


@pytest.mark.parametrize(
  ("noise", "least"),
  [
    (lambda random: [random.normal(size=8) * 0.05], 0.92),
    (lambda random: [random.normal(size=40) * 0.05], 0.92),
    (lambda random: [random.standard_t(3, size=16) * 0.05], 0.92),  # a busy machine delays some rounds a lot
    (lambda random: [autoregressive(random, 40, 0.5, 0.05)], 0.88),
    (lambda random: [random.normal() * 0.05 + random.normal(size=size) * 0.02 for size in (24, 2, 2, 2, 2)], 0.88),
    (lambda random: [random.normal(size=size) * 0.05 for size in (24, 2, 2, 2)], 0.93),
  ],
  ids=["few rounds", "many rounds", "heavy tails", "autocorrelated", "sessions that differ", "sessions alike"],
)
def test_the_interval_of_a_ratio_contains_the_truth_about_95_times_in_100(noise, least):
  random = np.random.default_rng(0)
  assert least <= coverage(lambda: noise(random)) <= 0.995


def test_a_drift_that_members_have_in_common_does_not_widen_the_interval_of_their_ratio():
  random, widths = np.random.default_rng(1), {}
  drift = np.cumsum(random.normal(size=30)) * 0.1
  dense, moe = drift + random.normal(size=30) * 0.01, drift + random.normal(size=30) * 0.01
  for name, series in {"one": dense, "ratio": moe - dense}.items():
    estimate = geometric_mean([series])
    widths[name] = math.log(estimate.high / estimate.low)
  assert widths["ratio"] < 0.015 < 0.1 < widths["one"]


def test_more_rounds_make_the_interval_narrower_and_one_round_has_none():
  random = np.random.default_rng(2)
  widths = [geometric_mean([random.normal(size=size)]) for size in (10, 40, 160, 640)]
  ratios = [a.high / a.low for a in widths]
  assert ratios == sorted(ratios, reverse=True)
  assert geometric_mean([np.zeros(1)]).interval == (None, None)
  assert not geometric_mean([np.zeros(1)]).is_within(0.0, 9.0)


def test_sessions_that_differ_count_alike_and_sessions_that_agree_count_by_their_rounds():
  low, high = np.tile([-0.001, 0.001], 20), np.array([0.999, 1.001])
  assert math.log(geometric_mean([low, high]).value) == pytest.approx(0.5, abs=0.01)
  noisy = [np.tile([-1.0, 1.0], 20), np.array([-0.95, 1.05])]
  assert math.log(geometric_mean(noisy).value) == pytest.approx(0.05 * 2 / 42, abs=1e-6)


def test_the_variance_of_a_block_bootstrap_is_that_of_its_samples():
  random = np.random.default_rng(3)
  series = autoregressive(random, 12, 0.7, 1.0)
  assert variance_of_mean(series, 1) == pytest.approx(series.var() / 11)
  starts = random.integers(0, 12, (20_000, 4))
  sampled = series[(starts[..., None] + np.arange(3)) % 12].mean(axis=(1, 2))
  assert variance_of_mean(series, 3) == pytest.approx(sampled.var() * 4 / 3, rel=0.05)
  assert block_length(series) > 1 == block_length(np.tile([1.0, -1.0], 8))


def sizes_of(random, documents: int) -> np.ndarray:
  return random.lognormal(8, 1, documents)


def scores(random, bytes_Y: np.ndarray, gap: float, runs: int, seeds: float, difficulty_Y: np.ndarray) -> Scores:
  """Scores of a model with noise between documents (paired), documents and models, and seeds."""
  of_document_Y = 2 + gap + difficulty_Y + random.normal(size=len(bytes_Y)) * 0.02
  return Scores((of_document_Y + random.normal(size=(runs, 1)) * seeds) * bytes_Y, bytes_Y)


@pytest.mark.slow
@pytest.mark.parametrize(("documents", "seeds"), [(18, 0.0), (18, 0.03), (60, 0.03)])
def test_intervals_of_several_candidates_contain_all_true_differences_at_once(documents, seeds):
  """The variance between seeds is pooled over four members with two runs."""
  random, hits, trials = np.random.default_rng(4), 0, 120
  for _ in range(trials):
    bytes_Y, difficulty_Y = sizes_of(random, documents), random.normal(size=documents) * 0.3
    gaps = {"dense": 0.0, "a": -0.05, "b": 0.0, "c": 0.05}
    models = {name: scores(random, bytes_Y, gap, 2, seeds, difficulty_Y) for name, gap in gaps.items()}
    dense = models.pop("dense")
    found = differences(dense, models, seed_variance([dense, *models.values()]))
    hits += all(found[name].low <= gaps[name] <= found[name].high for name in models)
  assert hits / trials >= 0.88


def test_a_difference_is_paired_by_document():
  random = np.random.default_rng(5)
  bytes_Y, difficulty_Y = np.full(40, 100.0), random.normal(size=40) * 0.5
  dense, moe = (scores(random, bytes_Y, gap, 1, 0.0, difficulty_Y) for gap in (0.0, 0.1))
  (found,) = differences(dense, {"moe": moe}, CERTAIN_SEEDS).values()
  assert found.value == pytest.approx(moe.value - dense.value) and found.stderr < 0.01
  assert 0 < found.low < found.value < found.high
  assert found.detectable == pytest.approx((2.02 + 0.85) * found.stderr, rel=0.02)
  assert found == differences(dense, {"moe": moe}, CERTAIN_SEEDS)["moe"]


def test_more_candidates_make_each_interval_wider():
  random = np.random.default_rng(6)
  bytes_Y, difficulty_Y = np.full(40, 100.0), np.zeros(40)
  dense = scores(random, bytes_Y, 0.0, 1, 0.0, difficulty_Y)
  others = {name: scores(random, bytes_Y, 0.0, 1, 0.0, difficulty_Y) for name in "abcdef"}
  alone = differences(dense, {"a": others["a"]}, CERTAIN_SEEDS)["a"]
  together = differences(dense, others, CERTAIN_SEEDS)["a"]
  assert together.high - together.low > 1.1 * (alone.high - alone.low)
  assert together.value == alone.value


def test_without_several_seeds_or_documents_no_interval_is_known():
  random = np.random.default_rng(7)
  for runs, documents in ((1, 40), (2, 1)):
    bytes_Y = np.full(documents, 100.0)
    dense, moe = (scores(random, bytes_Y, gap, runs, 0.01, np.zeros(documents)) for gap in (0.0, 1.0))
    (found,) = differences(dense, {"moe": moe}, seed_variance([dense, moe])).values()
    assert not math.isfinite(found.low) and not math.isfinite(found.high) and found.value > 0.9
  assert seed_variance([Scores(np.array([[1.0], [3.0]]), np.array([2.0]))]) == SeedVariance(0.5, 1)


def test_a_document_with_most_bytes_counts_as_few_documents():
  random, widths = np.random.default_rng(8), []
  for largest in (1.0, 60.0):
    bytes_Y = np.array([largest, *[1.0] * 19])
    dense, moe = (scores(random, bytes_Y, 0.0, 1, 0.0, np.zeros(20)) for _ in range(2))
    (found,) = differences(dense, {"moe": moe}, CERTAIN_SEEDS).values()
    widths.append((found.high - found.value) / found.stderr)
  assert widths[0] == pytest.approx(2.09, abs=0.01) and widths[1] > 3
