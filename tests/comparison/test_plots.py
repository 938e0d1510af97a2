"""Plots: what they say, that labels keep apart, that pictures are not blank."""

import io
import itertools
import re
import xml.etree.ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from moejax.comparison.palette import member_colors
from moejax.comparison.plots import labels
from moejax.comparison.plots.drawing import WIDTH, new_figure, plain, round_ticks, style
from moejax.comparison.plots.expert_load import expert_load
from moejax.comparison.plots.loss_curves import loss_curves
from moejax.comparison.plots.routing import routing
from moejax.comparison.plots.speed_accuracy import speed_accuracy, task_measures
from moejax.comparison.record import from_json


def colors_in(png: bytes) -> int:
  pixels = (imread(io.BytesIO(png), format="png")[..., :3] * 255).astype(np.uint32)
  return len(np.unique(pixels @ np.array([65536, 256, 1], dtype=np.uint32)))


def test_every_member_has_its_own_color_and_keeps_it(comparison):
  colors = member_colors(from_json(comparison))
  assert len(set(colors.values())) == 6
  comparison["members"].reverse()
  assert len(set(member_colors(from_json(comparison)).values())) == 6


@pytest.mark.parametrize("same_time", [False, True])
def test_speed_accuracy_names_every_member(comparison, same_time):
  if same_time:
    comparison["members"] = comparison["members"][:2]
    comparison["pairs"] = comparison["pairs"][:1]
    for member in comparison["members"]:
      member.update(step_time_s=1.012, accuracy_stderr=None)
  plots = speed_accuracy(from_json(comparison))
  assert [plot.name for plot in plots] == ["speed_accuracy", "speed_bits_per_byte"]
  for plot in plots:
    xml.etree.ElementTree.fromstring(plot.svg.replace("xlink:href", "href"))
    for member in comparison["members"]:
      assert member["name"] in plot.alt
      assert f">{member['name']}</text>" in plot.svg
    assert colors_in(plot.png) > 100


def test_speed_accuracy_draws_what_there_is(comparison):
  for member in comparison["members"]:
    member["accuracy"] = None
  comparison["members"][0]["step_time_s"] = None
  comparison["members"][1]["bits_per_byte"] = float("nan")
  (plot,) = speed_accuracy(from_json(comparison))
  assert plot.name == "speed_bits_per_byte"
  assert "dense_small" not in plot.alt and "moe_small_8e" not in plot.alt and "dense_large 55.1 ms" in plot.alt


def test_each_benchmark_has_a_curve_of_its_own_and_a_perplexity_is_better_below(comparison):
  first, second = comparison["members"][:2]
  first |= {"tasks/sciq/acc": 0.31, "tasks/sciq/acc_stderr": 0.02, "tasks/wikitext/word_perplexity": 90.0}
  second |= {"tasks/sciq/acc": 0.35, "tasks/sciq/acc_stderr": 0.02, "tasks/average/accuracy": 0.4}
  whole = from_json(comparison)
  measures = task_measures(whole)
  assert [(measure.key, measure.scale, measure.reversed) for measure in measures] == [
    ("tasks/sciq/acc", 100.0, False), ("tasks/wikitext/word_perplexity", 1.0, True),
    ("tasks/average/accuracy", 100.0, False),
  ]  # fmt: skip
  sciq, wikitext, average = speed_accuracy(whole, measures)
  assert sciq.name == "speed_tasks_sciq_acc"
  assert "acc of sciq. dense_small 15.2 ms, 31.0 ± 2.0 %; moe_small_8e 15.5 ms, 35.0 ± 2.0 %." in sciq.alt
  assert "dense_small 15.2 ms, 90.0" in wikitext.alt and "moe_small_8e" not in wikitext.alt
  assert "dense_small" not in average.alt


def test_names_are_text_in_a_plot_and_not_mathematics(comparison):
  comparison = {"suite": "s", "members": comparison["members"][:1], "pairs": []}
  comparison["members"][0].update(name="$a_b$ <i>", pair="$a_b$ <i>")
  plot = speed_accuracy(from_json(comparison))[0]
  assert ">$a_b$ &lt;i&gt;</text>" in plot.svg and "<i>" not in plot.svg


def test_labels_cover_neither_each_other_nor_markers():
  random = np.random.default_rng(0)
  points = [tuple(point) for point in random.uniform(0, 1, (10, 2))] + [(0.5, 0.5), (0.51, 0.5), (0.5, 0.5)]
  with style():
    figure = new_figure(4.5)
    axes = figure.add_subplot()
    axes.set_xlim(-0.2, 1.2)
    axes.set_ylim(-0.2, 1.2)
    notes = labels.place(axes, points, [f"member_{i}" for i in range(len(points))])
    boxes = [np.array(note.get_window_extent().extents) for note in notes]
    frame = np.array(axes.get_window_extent().extents)
    anchors = axes.transData.transform(points)
  assert all(labels.overlap(one, other) == 0 for one, other in itertools.combinations(boxes, 2))
  assert all((box[:2] >= frame[:2]).all() and (box[2:] <= frame[2:]).all() for box in boxes)
  for box, anchor in itertools.product(boxes, anchors):
    assert not ((box[:2] < anchor) & (anchor < box[2:])).all()


def test_overlap_is_the_shared_area():
  assert labels.overlap(np.array([0, 0, 4, 3]), np.array([2, 1, 9, 9])) == 4.0
  assert labels.overlap(np.array([0, 0, 1, 1]), np.array([1, 0, 2, 1])) == 0.0


def test_ticks_are_round_and_few():
  assert round_ticks(13, 65) == [15, 20, 30, 50]
  assert round_ticks(1, 1000) == [1, 10, 100, 1000]
  for low, high in ((0.02, 18.0), (4e4, 2.5e6), (3.1, 3.3), (1e-3, 1e6)):
    ticks = round_ticks(low, high)
    assert 1 < len(ticks) <= 8 and all(low <= tick <= high for tick in ticks)
  assert [plain(value) for value in (0.02, 15.0, 1200, 30_000, 2_500_000)] == ["0.02", "15", "1,200", "30k", "2.5M"]


def test_loss_curves_are_two_for_each_pair(comparison, metrics_of):
  metrics = {member["name"]: metrics_of(member) for member in comparison["members"]}
  plots = loss_curves(from_json(comparison), metrics)
  assert [plot.name for plot in plots] == [
    "loss_time_dense_small", "loss_tokens_dense_small", "loss_time_dense_large", "loss_tokens_dense_large",
  ]  # fmt: skip
  assert "moe_small_16e" in plots[0].alt and "dense_large" not in plots[0].alt
  assert "after 18.2 s" in plots[0].alt and "after 2.46M tokens" in plots[1].alt


@pytest.mark.parametrize("points", [1, 2, 3])
def test_loss_curves_of_runs_that_just_began(comparison, metrics_of, points):
  comparison = {**comparison, "members": comparison["members"][:2], "pairs": comparison["pairs"][:1]}
  dense, moe = comparison["members"]
  metrics = {dense["name"]: metrics_of(dense), moe["name"]: metrics_of(moe)[:points]}
  assert len(loss_curves(from_json(comparison), metrics)) == 2
  assert len(loss_curves(from_json(comparison), {moe["name"]: metrics_of(moe)[:points]})) == 2
  assert loss_curves(from_json(comparison), {}) == []


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 6, 16])
def test_expert_load_has_a_panel_for_each_layer(comparison, metrics_of, layers):
  moe = {**comparison["members"][1], "pair": "dense_small"}
  comparison = {"suite": "s", "members": [comparison["members"][0], moe], "pairs": []}
  metrics = [{"step": row["step"], "router/load": row["router/load"][:1] * layers} for row in metrics_of(moe)[:40]]
  plots = expert_load(from_json(comparison), {moe["name"]: metrics, "dense_small": []})
  assert list(plots) == ["moe_small_8e"]
  plot = plots["moe_small_8e"]
  for layer in range(layers):
    assert f">sparse layer {layer + 1}</text>" in plot.svg
  assert plot.svg.count("<image ") >= layers + 1
  assert colors_in(plot.png) > 200
  assert imread(io.BytesIO(plot.png), format="png").shape[1] == round(200 * WIDTH)


def test_plots_do_not_share_ids(comparison):
  one, other = speed_accuracy(from_json(comparison))

  def ids(svg: str) -> set[str]:
    return {element.get("id") for element in xml.etree.ElementTree.fromstring(svg.replace("xlink:href", "href")).iter()}

  assert ids(one.svg) & ids(other.svg) <= {None}
  references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', one.svg))
  assert references and references <= ids(one.svg)


def test_equal_data_give_equal_bytes(comparison):
  one, other = (speed_accuracy(from_json(comparison))[0] for _ in range(2))
  assert one == other


def test_routing_shows_entropy_drops_and_every_auxiliary_loss_of_each_sparse_member(comparison, metrics_of):
  metrics = {member["name"]: metrics_of(member) for member in comparison["members"]}
  plots = routing(from_json(comparison), metrics)
  assert list(plots) == [member["name"] for member in comparison["members"] if member["kind"] == "moe"]
  plot = plots["moe_small_8e"]
  for words in ("entropy (nats): layer 2 ", "dropped part of choices: layer 2 0.013", "load balance 1", "router z 4.9"):
    assert words in plot.alt
  assert " z " not in plot.alt.replace("router z", "")  # that of the logits is another
  xml.etree.ElementTree.fromstring(plot.svg.replace("xlink:href", "href"))
  assert colors_in(plot.png) > 50
