"""The published laws reproduce the tables and optima of their papers, and know the limits of their data."""

import math

import numpy as np
import pytest

from moejax.lookup import find_experiment
from moejax.scaling.laws import (
  JOINT,
  LAWS,
  effective_parameters,
  efficiency_leverage,
  grug_v16,
  joint_loss,
  marin_loss,
  routed_loss,
)
from moejax.scaling.shapes import Shape, shape_of


def loss(name: str, shape: Shape, tokens: float) -> float:
  return float(LAWS[name].loss(shape, np.array([tokens]))[0])


def test_the_joint_law_has_the_compute_optimal_sizes_of_its_table_1():
  sizes = np.geomspace(1e8, 1e10, 20_001)
  tokens = 1e20 / (6 * sizes)
  published = {1: (1.73, 9.6), 2: (1.47, None), 4: (1.21, None), 8: (0.99, None), 16: (0.81, None), 32: (0.67, 24.8)}
  for experts, (size, data) in published.items():
    best = np.argmin(joint_loss(JOINT, sizes, tokens, experts))
    assert sizes[best] / 1e9 == pytest.approx(size, abs=0.01)
    assert data is None or tokens[best] / 1e9 == pytest.approx(data, rel=0.01)


@pytest.mark.parametrize(
  ("base", "tokens", "granularity", "published"),
  [(100e6, 4.37e9, 8, 3.133), (1e9, 28.94e9, 16, 2.491), (7e9, 137.6e9, 32, 2.076), (1e12, 7.94e12, 64, 1.367)],
)
def test_the_fine_grained_law_has_the_losses_of_its_table_2_in_total_parameters(base, tokens, granularity, published):
  # 43 = (8 x 64 + 4) / 12: parameters of an MoE with 64 times the feed-forward of a dense model of this size.
  shape = Shape(active=base, total=43 * base, expansion=64, granularity=granularity)
  assert loss("fine-grained", shape, tokens) == pytest.approx(published, abs=0.025)
  assert loss("fine-grained", Shape(active=base, total=base, expansion=64, granularity=granularity), tokens) > (
    published + 0.2
  )


def test_a_routed_model_has_the_loss_of_the_dense_model_of_its_effective_size():
  for size, experts in ((1e8, 8), (1e8, 128), (1.3e9, 32)):
    equal = effective_parameters(size, experts)
    assert equal > size and routed_loss(equal, 1) == pytest.approx(routed_loss(size, experts), rel=1e-9)
  assert effective_parameters(2e8, 1) == pytest.approx(2e8)
  gains = [effective_parameters(size, 64) / size for size in (1e7, 1e8, 1e9)]
  assert gains == sorted(gains, reverse=True)  # the paper's: routing helps small models more


def test_efficiency_leverage_has_the_examples_of_its_text():
  assert 7.0 < efficiency_leverage(0.031, 12, 1e22) < 7.5
  granularities = np.arange(1, 65)
  best = granularities[np.argmax([efficiency_leverage(0.031, g, 1e22) for g in granularities])]
  assert 8 <= best <= 12
  assert efficiency_leverage(0.1, 8, 1e20) < efficiency_leverage(0.03, 8, 1e20) < efficiency_leverage(0.03, 8, 1e22)


def test_marins_fits_have_its_published_losses_and_its_claim():
  assert grug_v16(1e21)[2] == pytest.approx(2.606, abs=0.001)
  rows = [(9.4e16, 3.676, False), (1.2e19, 2.847, False), (3.5e17, 3.156, True), (4.3e19, 2.504, True)]
  for flops, published, sparse in rows:
    assert marin_loss(flops, sparse) == pytest.approx(published, abs=0.025)
  # 4.2 times less compute at the loss of the largest dense model
  equal = ((marin_loss(1.2e19, False) - 1.2) / 58.67) ** (-1 / 0.0842)
  assert 1.2e19 / equal == pytest.approx(4.2, abs=0.3)


def test_every_law_prefers_more_tokens_and_parameters_and_an_moe_at_equal_active_parameters():
  for name, law in LAWS.items():
    experts = 64 if name == "fine-grained" else 16
    dense = Shape(active=1e9, total=1e9)
    sparse = Shape(active=1e9, total=1e9 * (1 + 2 / 3 * (experts - 1)), expansion=experts, granularity=4)
    assert law.applies(dense) and law.applies(sparse)
    assert loss(name, dense, 4e10) < loss(name, dense, 2e10)
    assert loss(name, Shape(active=2e9, total=2e9), 2e10) < loss(name, dense, 2e10)
    assert loss(name, sparse, 2e10) < loss(name, dense, 2e10), name


def test_a_law_says_what_lies_outside_its_range_and_is_less_certain_there():
  law = LAWS["joint"]
  inside, outside = Shape(active=1e9, total=1e9), Shape(active=27e9, total=50e9, expansion=64, granularity=2)
  assert not law.outside(inside, 1e10) and law.spread(inside, 1e10) == law.error
  factors = law.outside(outside, 1e10)
  assert factors == pytest.approx({"active parameters": 10, "total parameters": 10, "expansion": 2, "granularity": 2})
  assert law.spread(outside, 1e10) == pytest.approx(law.error * (1 + math.log10(400)))
  assert LAWS["routed"].outside(inside, 13e9)["tokens"] == pytest.approx(10)


def test_the_shape_of_an_experiment_counts_every_feed_forward_layer():
  dense, sparse = (shape_of(find_experiment(name)) for name in ("dense_6b4", "moe_6b4_64e"))
  assert dense.is_dense and (dense.expansion, dense.granularity) == (1, 1) and dense.total == dense.active
  # Two of 64 experts in every second layer, each as wide as the dense layers beside them.
  assert sparse.expansion == pytest.approx((1 + 64) / (1 + 2), rel=0.001) and sparse.granularity == 2
