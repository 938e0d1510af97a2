"""Series from metrics: exact values on small ones."""

import numpy as np
import pytest

from moejax.comparison.curves import columns, last_tenth, layer_names, per_layer, relative_load, series, smooth, thin


def test_series_leaves_out_what_is_not_finite():
  metrics = [{"step": 1, "loss": 3.0}, {"step": 2}, {"step": 3, "loss": float("nan")}, {"step": 4, "loss": 1.5}]
  steps, loss = series(metrics, "loss")
  assert steps.tolist() == [1.0, 4.0] and loss.tolist() == [3.0, 1.5]
  assert [len(part) for part in series([], "loss")] == [0, 0]


def test_smooth_is_the_mean_over_a_window_of_one_width_on_a_log_axis():
  steps, values = np.array([1.0, 10, 11, 12, 100]), np.array([5.0, 3, 6, 9, 1])
  # Within a factor 1.1: 10 has 11; 11 has 10 and 12 (12 / 11 < 1.1); 12 has 11; the outer ones stand alone.
  np.testing.assert_allclose(smooth(steps, values, width=0.1), [5.0, 4.5, 6.0, 7.5, 1.0], rtol=1e-12)
  assert smooth(np.zeros(0), np.zeros(0)).size == 0


def test_smooth_leaves_a_constant_alone():
  np.testing.assert_allclose(smooth(np.arange(0.0, 300), np.full(300, 2.5)), 2.5, rtol=1e-12)


def test_thin_keeps_both_ends_and_short_series():
  steps = np.arange(1.0, 10_001)
  thinned, doubled = thin(steps, 2 * steps, points=200)
  assert thinned[0] == 1 and thinned[-1] == 10_000 and 150 < len(thinned) <= 250
  assert (doubled == 2 * thinned).all()
  assert thin(steps[:10], steps[:10])[0].tolist() == steps[:10].tolist()


def test_relative_load_is_one_when_balanced():
  metrics = [
    {"step": 5, "router/load": [[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]},
    {"step": 6},
    {"step": 7, "router/load": [[0.5, 0.5, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]]},
  ]
  steps, load = relative_load(metrics)
  assert steps.tolist() == [5, 7] and load.shape == (2, 2, 4)
  np.testing.assert_allclose(load, [[[1, 1, 1, 1], [4, 0, 0, 0]], [[2, 2, 0, 0], [0.4, 0.8, 1.2, 1.6]]], rtol=1e-12)


@pytest.mark.parametrize("load", [None, [], [[]], [[0.5, 0.5], [1.0]], [["x"]], [[float("nan"), 1.0]]])
def test_relative_load_passes_over_what_is_no_table(load):
  assert relative_load([{"step": 1, "router/load": load}])[0].size == 0


def test_relative_load_of_another_shape_is_of_another_run():
  steps, load = relative_load([{"step": 1, "router/load": [[0.5, 0.5]]}, {"step": 2, "router/load": [[0.2] * 5]}])
  assert steps.tolist() == [2] and load.shape == (1, 1, 5)


def test_per_layer_orders_layers_by_number():
  key = "router/entropy/layer_"
  metrics = [{"step": 1, f"{key}10": 0.1, f"{key}02": 0.2}, {"step": 2, f"{key}10": 0.3}]
  steps, layers, values = per_layer(metrics, "router/entropy")
  assert (steps.tolist(), layers, values.tolist()) == ([1], [2, 10], [[0.2, 0.1]])
  assert per_layer(metrics, "router/dropped_fraction")[1] == []


def test_layer_names_follow_the_metrics():
  metrics = [{"step": 1, "router/load_max_over_mean/layer_01": 1.0, "router/load_max_over_mean/layer_03": 1.0}]
  assert layer_names(metrics, 2) == ["layer 1", "layer 3"]
  assert layer_names(metrics, 3) == ["sparse layer 1", "sparse layer 2", "sparse layer 3"]


def test_columns_are_means_between_midpoints():
  edges, means = columns(np.array([10.0, 20, 30, 40]), np.array([1.0, 3, 5, 9]), most=2)
  assert edges.tolist() == [5, 25, 40] and means.tolist() == [2, 7]
  edges, means = columns(np.array([10.0]), np.array([[1.0, 2.0]]))
  assert edges.tolist() == [0, 10] and means.tolist() == [[1, 2]]


def test_last_tenth():
  assert last_tenth(np.arange(20.0)) == 18.5
  assert last_tenth(np.array([4.0])) == 4.0
