"""Tokens a second and MFU: real tokens and accepted work alone count."""

from dataclasses import replace

import numpy as np
import pytest
from training_fixtures import random_batch, run_steps, spec_of, tiny

from moejax.config.parameters import flops_per_token
from moejax.training.clock import DROPPED, Clock, Work, fetch_work, speed, stall_s

MODEL = tiny(True).model
A = 2
"""Experts per token of the model."""
PEAK = 1e12


def speed_of(*laps):
  return speed(list(laps), MODEL, 32, PEAK)


def test_by_hand():
  found = speed_of((0.5, Work(1000, 2.0, 0.0)), (1.5, Work(600, 2.0, 0.0)))
  assert found["step_time_s"] == 1.0 and found["tokens_per_s"] == 800.0 and found[DROPPED] == 0.0
  assert found["mfu"] == pytest.approx(800 * flops_per_token(MODEL, 32) / PEAK)


def test_padding_never_raises_tokens_a_second_or_mfu_and_drops_lower_mfu():
  random = np.random.default_rng(0)
  for _ in range(100):
    tokens, seconds, dropped = int(random.integers(1, 10**6)), random.uniform(0.01, 9), random.uniform(0, 0.9)
    base = speed_of((seconds, Work(tokens, A * (1 - dropped), dropped)))
    padded = speed_of(
      (seconds * random.uniform(1, 2), Work(tokens - int(random.integers(0, tokens)), A * (1 - dropped), dropped))
    )
    assert padded["tokens_per_s"] <= base["tokens_per_s"] and padded["mfu"] <= base["mfu"]
    more = random.uniform(dropped, 1)
    dropping = speed_of((seconds, Work(tokens, A * (1 - more), more)))
    assert dropping["tokens_per_s"] == base["tokens_per_s"] and dropping["mfu"] < base["mfu"]
    assert dropping[DROPPED] > base[DROPPED]


def test_a_mean_over_steps_is_that_of_all_their_work_in_all_their_time():
  random = np.random.default_rng(1)
  laps = [(random.uniform(0.1, 2), Work(int(random.integers(1, 999)), random.uniform(0, 3), 0.5)) for _ in range(20)]
  singly = [speed_of(lap) for lap in laps]
  whole = speed_of(*laps)
  seconds = np.array([lap[0] for lap in laps])
  for name in ("tokens_per_s", "mfu"):
    assert whole[name] == pytest.approx(np.average([one[name] for one in singly], weights=seconds))


def test_the_speed_that_is_shown_is_the_one_that_is_written(monkeypatch):
  """The host hears of the second step 8 seconds late, and of the third at once."""
  times = iter([0.0, 1.0, 10.0, 10.0, 11.0, 12.0])
  monkeypatch.setattr("moejax.training.clock.time.perf_counter", lambda: next(times))
  clock = Clock(spec_of(tiny(False)))
  shown = [clock.lap(Work(30))["tokens_per_s"] for _ in range(3)]
  assert shown == [30.0, 6.0, 9.0] and clock.mean()["tokens_per_s"] == 9.0
  assert [clock.lap(Work(30))["tokens_per_s"] for _ in range(2)] == [30.0, 30.0]


def test_without_a_known_peak_there_is_no_mfu_and_without_experts_no_dropped_part():
  assert set(speed([(1.0, Work(5))], tiny(False).model, 32, None)) == {"step_time_s", "tokens_per_s"}
  clock = Clock(spec_of(tiny(False)))
  assert set(clock.lap(Work(5))) == {"step_time_s", "tokens_per_s"}


@pytest.mark.slow
@pytest.mark.parametrize(
  "kept", [pytest.param(0.25, id="dropping"), pytest.param(1.0, id="roomy", marks=pytest.mark.slow)]
)
def test_the_work_of_a_step_is_its_weighted_targets_and_the_choices_that_experts_took(kept):
  """16 experts' rows of a group of 16 tokens, of which capacity_factor A x 16 / E are kept an expert at most."""
  experiment = tiny(True)
  moe = replace(experiment.model.moe, capacity_factor=8.0 if kept == 1.0 else kept)
  experiment = replace(experiment, model=replace(experiment.model, moe=moe))
  batch = random_batch(experiment)
  metrics = run_steps(experiment, steps=1)[2]
  work = fetch_work(metrics)
  assert work.tokens == np.count_nonzero(batch["weights"])
  real = np.count_nonzero(batch["segments"])
  accepted = work.choices_per_token * real
  assert accepted == pytest.approx(A * real * (1 - work.dropped_fraction))
  assert work.dropped_fraction == pytest.approx(float(metrics[DROPPED][0]), abs=1e-6)
  if kept == 1.0:
    assert work.dropped_fraction == 0.0 and work.choices_per_token == A
  else:
    groups, rows = 16 * 32 // 16, 1  # ceil(0.25 x 2 x 16 / 8)
    assert 0 < accepted <= groups * 8 * rows
    dropless = work.tokens * flops_per_token(experiment.model, 32)
    expert = 6 * 3 * 32 * 16
    assert work.flops(experiment.model, 32) == pytest.approx(
      dropless - work.tokens * expert * A * work.dropped_fraction
    )


def test_layers_that_tokens_skip_count_by_the_tokens_that_they_have():
  """Two layers, the second with an eighth of 64 tokens, of which each chooses two experts."""
  choices_LE = np.array([[16] * 8, [2] * 8], np.int32)
  metrics = {"target_tokens": 64, "router/choices": choices_LE, "router/choices_per_token": np.array([2.0, 2.0])}
  work = fetch_work(metrics | {DROPPED: np.array([0.3, 0.0])})
  assert work.dropped_fraction == pytest.approx(0.3 * 128 / 144)
  assert work.choices_per_token == pytest.approx((0.7 * 128 + 16) / 72)
  none = fetch_work(
    metrics | {"router/choices": 0 * choices_LE, "router/choices_per_token": np.zeros(2), DROPPED: np.zeros(2)}
  )
  assert (none.choices_per_token, none.dropped_fraction) == (0.0, 0.0)


def test_a_stall_is_a_step_that_takes_over_three_times_as_long_as_recent_ones():
  usual = [1.0] * 20
  assert stall_s(3.0, usual) == 0.0 and stall_s(3.5, usual) == 2.5
  assert stall_s(9.0, usual[:5]) == 0.0  # too few to know what is usual
