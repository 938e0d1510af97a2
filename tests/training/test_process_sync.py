"""Which process is reported as slow. With real processes: tests/launch/test_commands.py."""

import numpy as np
import pytest

from moejax.training.process_sync import FEWEST_STEPS, RECENT_STEPS, slow_process


def times(seed: int, count: int = 4, base_s: float = 0.002, noise_s: float = 0.0) -> np.ndarray:
  """Input times [N, Z] with delays by chance: a heavy tail, as on a busy machine."""
  draw = np.random.default_rng(seed)
  return base_s + noise_s * draw.pareto(1.5, (RECENT_STEPS, count))


@pytest.mark.parametrize("count", [2, 3, 16])
def test_a_process_that_is_slow_in_most_steps_is_named_whatever_the_noise(count):
  for seed in range(200):
    input_s_YZ = times(seed, count, noise_s=0.01)
    victim = seed % count
    input_s_YZ[:, victim] += 0.3
    assert slow_process(input_s_YZ, step_time_s=1.0) == victim


@pytest.mark.parametrize("count", [2, 3, 16])
def test_noise_of_a_tenth_of_a_step_names_nobody(count):
  for seed in range(200):
    assert slow_process(times(seed, count, noise_s=0.01), step_time_s=0.1) is None


def test_single_slow_steps_and_short_times_name_nobody():
  spike_YZ = times(0)
  spike_YZ[3:8, 1] += 5.0
  assert slow_process(spike_YZ, step_time_s=0.1) is None
  tiny_YZ = times(0)
  tiny_YZ[:, 1] += 0.01  # of a step of 20 ms, but too short to care
  assert slow_process(tiny_YZ, step_time_s=0.02) is None


def test_nobody_is_named_before_there_are_enough_steps():
  input_s_YZ = times(0)
  input_s_YZ[:, 2] += 1.0
  assert slow_process(input_s_YZ[: FEWEST_STEPS - 1], step_time_s=0.1) is None
  assert slow_process(input_s_YZ[:FEWEST_STEPS], step_time_s=0.1) == 2
