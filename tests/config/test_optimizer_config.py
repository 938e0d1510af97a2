"""Optimizers and schedules: what is refused."""

import copy
import dataclasses
import pickle

import pytest

from moejax.config import AdamW, Cosine, Optimizer
from moejax.errors import UserError


@pytest.mark.parametrize("name", ["learning_rate", "epsilon", "gradient_clip"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_rate_epsilon_and_clip_must_be_above_0(name, value):
  with pytest.raises(UserError, match=rf"^optimizer\.{name}={value} must be above 0$"):
    AdamW(**{"learning_rate": 1e-3, name: value})


def test_what_json_cannot_hold_is_refused():
  for name in ("learning_rate", "gradient_clip", "weight_decay"):
    with pytest.raises(UserError, match=rf"^optimizer\.{name}=inf must be at most 1e\+38"):
      AdamW(**{"learning_rate": 1e-3, name: float("inf")})


def test_what_float32_would_round_to_0_1_or_infinity_is_refused():
  for fields in ({"learning_rate": 1e39}, {"learning_rate": 1e-40}, {"epsilon": 1e-46}, {"beta1": 1 - 1e-9}):
    with pytest.raises(UserError, match=r"^optimizer\.\w+=\S+ must be at (most|least) .* in float32$"):
      AdamW(**{"learning_rate": 1e-3} | fields)


def test_weight_decay_may_be_0_but_not_below():
  assert AdamW(learning_rate=1e-3, weight_decay=0.0).weight_decay == 0.0
  with pytest.raises(UserError, match=r"^optimizer\.weight_decay=-0\.1 must be 0 or above$"):
    AdamW(learning_rate=1e-3, weight_decay=-0.1)


@pytest.mark.parametrize("name", ["final_fraction", "warmup_fraction"])
def test_fractions_lie_between_0_and_1_with_both(name):
  for value in (0.0, 1.0):
    assert getattr(Cosine(**{name: value}), name) == value
  for value in (-0.01, 1.01):
    with pytest.raises(UserError, match=rf"^schedule\.{name}={value} must lie between 0\.0 and 1\.0$"):
      Cosine(**{name: value})


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_moments_decay(name):
  assert getattr(AdamW(learning_rate=1e-3, **{name: 0.0}), name) == 0.0
  for value in (-0.1, 1.0):  # at 1 the bias correction would divide by 0
    with pytest.raises(UserError, match=rf"^optimizer\.{name}={value} must be 0 or above and below 1$"):
      AdamW(learning_rate=1e-3, **{name: value})


def test_the_default_kind_of_optimizer_is_adamw():
  made = Optimizer(learning_rate=1e-3, beta2=0.9)
  assert type(made) is AdamW and made == AdamW(learning_rate=1e-3, beta2=0.9)
  assert copy.deepcopy(made) == dataclasses.replace(made) == pickle.loads(pickle.dumps(made)) == made
