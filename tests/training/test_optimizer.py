"""The learning rate of each step."""

import dataclasses
import itertools

import pytest

from moejax.config import Optimizer
from moejax.training.optimizer import learning_rate

CONFIG = Optimizer(learning_rate=1.0, final_fraction=0.1, warmup_fraction=0.1)


def test_it_rises_in_equal_steps_to_the_peak_and_falls_to_the_final_fraction():
  rates = [learning_rate(CONFIG, step, 101) for step in range(101)]
  assert rates[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
  assert rates[10] == pytest.approx(1.0) and max(rates) == pytest.approx(1.0)
  assert rates[-1] == pytest.approx(0.1)
  assert all(a >= b for a, b in itertools.pairwise(rates[11:]))


def test_half_way_down_it_is_the_mean_of_peak_and_final():
  config = dataclasses.replace(CONFIG, warmup_fraction=0.0)
  assert learning_rate(config, 50, 101) == pytest.approx(0.55)


def test_one_step_is_possible():
  assert 0.0 < learning_rate(CONFIG, 0, 1) <= 1.0
