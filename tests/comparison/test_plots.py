"""Figures: what they say, which values they hold, and how labels keep apart."""

import itertools
import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from moejax.comparison import palette
from moejax.comparison.plots import labels
from moejax.comparison.plots.drawing import draw
from moejax.comparison.plots.expert_load import CELLS, expert_load
from moejax.comparison.plots.figure import HEIGHT, WIDTH, patched
from moejax.comparison.plots.loss_curves import loss_curves
from moejax.comparison.plots.routing import routing
from moejax.comparison.plots.sparsity import sparsity_plots
from moejax.comparison.plots.speed_accuracy import speed_accuracy
from moejax.comparison.plots.time_by_cause import time_by_cause
from moejax.comparison.record import from_json


def luminance(color: str) -> float:
  channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
  light, dark = sorted((luminance(one), luminance(other)), reverse=True)
  return (light + 0.05) / (dark + 0.05)


def texts(svg: str) -> list[str]:
  return [text for element in xml.etree.ElementTree.fromstring(svg).iter() if (text := element.text)]


@pytest.mark.parametrize("dark", [False, True])
def test_colors_stand_out_from_the_page_and_each_member_has_its_own(comparison, dark):
  pairs = []
  for i in range(len(palette.FAMILIES)):
    pair = [dict(member, name=f"{member['name']}_{i}", pair=f"dense_{i}") for member in comparison["members"][:3]]
    pair[0]["name"] = f"dense_{i}"
    pairs += pair
  colors = palette.variables(from_json({"suite": "s", "members": pairs, "pairs": []}), dark)
  members = [color for name, color in colors.items() if name.startswith("member-")]
  assert len(set(members)) == len(pairs) == 15
  assert all(contrast(color, colors["card"]) >= 3 for color in members)
  for text, behind in (("ink", "card"), ("muted", "card"), ("muted", "page"), ("accent", "page"), ("warn", "warn-soft"),
                       ("good", "good-soft")):  # fmt: skip
    assert contrast(colors[text], colors[behind]) >= 4.5


def test_layers_are_legible_on_both_pages():
  for color, theme in itertools.product(palette.layer_colors(24), (palette.LIGHT, palette.DARK)):
    assert contrast(color, theme["card"]) >= 3


@pytest.mark.parametrize("same_time", [False, True])
def test_speed_accuracy_has_every_member_in_words_and_in_the_drawing(comparison, same_time):
  if same_time:
    comparison["members"] = comparison["members"][:2]
    comparison["pairs"] = comparison["pairs"][:1]
    for member in comparison["members"]:
      member.update(step_time_s=1.012, accuracy_stderr=None)
  figure = speed_accuracy(from_json(comparison))
  assert list(figure.drawings()) == ["speed_bits_per_byte", "speed_accuracy"]
  names = [member["name"] for member in comparison["members"]]
  assert [entry.series for entry in figure.legend] == names
  for option in figure.choices[0].options:
    rows = option.patch["data"]["values"]
    assert [row["member"] for row in rows] == names and all(name in option.alt for name in names)
  first = figure.choices[0].options[0].patch["data"]["values"]
  assert [row["value"] for row in first] == [member["bits_per_byte"] for member in comparison["members"]]
  # The bars are the intervals that the verdict states: of the difference from the dense model, which has none itself.
  expected = [0.0092 if member["num_experts"] else 0.0 for member in comparison["members"]]
  assert [row["high"] - row["value"] for row in first] == pytest.approx(expected, abs=1e-4)
  svg, png = draw(figure.drawings()["speed_accuracy"], figure.title, "", palette.variables(from_json(comparison)))
  assert set(names) <= set(texts(svg)) and figure.title in texts(svg)
  assert "var(" not in svg and png.startswith(b"\x89PNG")


def test_the_x_axis_is_a_choice_of_speed_size_or_cost(comparison):
  figure = speed_accuracy(from_json(comparison))
  fields = [option.patch["encoding"]["x"]["field"] for option in figure.choices[1].options]
  assert fields == [
    "step_time",
    "train_time",
    "tokens_per_s",
    "parameters_active",
    "parameters_total",
    "flops",
    "tokens",
  ]
  row = figure.spec["data"]["values"][1]
  member = comparison["members"][1]
  assert row["step_time"] == pytest.approx(15.51) and row["flops"] == pytest.approx(
    member["model_flops_per_token"] * member["tokens"], rel=1e-5
  )
  assert [option.label for option in figure.choices[2].options] == ["linear", "log"]


def test_speed_accuracy_draws_what_there_is(comparison):
  for member in comparison["members"]:
    member["accuracy"] = None
  comparison["members"][0]["step_time_s"] = None
  comparison["members"][1]["bits_per_byte"] = float("nan")
  figure = speed_accuracy(from_json(comparison))
  assert list(figure.drawings()) == ["speed_bits_per_byte"]
  assert "dense_small" not in figure.alt and "moe_small_8e" not in figure.alt and "dense_large 55.1 ms" in figure.alt
  for member in comparison["members"]:
    member["bits_per_byte"] = None
  assert speed_accuracy(from_json(comparison)) is None


def test_benchmarks_are_further_measures_of_the_figure(comparison):
  first, second = comparison["members"][:2]
  first |= {"tasks/sciq/acc": 0.31, "tasks/sciq/acc_stderr": 0.02, "tasks/wikitext/word_perplexity": 90.0}
  second |= {"tasks/sciq/acc": 0.35, "tasks/sciq/acc_stderr": 0.02, "tasks/average/accuracy": 0.35}
  options = speed_accuracy(from_json(comparison)).choices[0].options[2:]
  assert [option.file for option in options] == [
    "speed_tasks_sciq_acc", "speed_tasks_wikitext_word_perplexity", "speed_tasks_average_accuracy",
  ]  # fmt: skip
  sciq, wikitext, average = options
  assert "acc of sciq. dense_small 15.2 ms, 31.0 ± 2.0 %; moe_small_8e 15.5 ms, 35.0 ± 2.0 %." in sciq.alt
  assert "dense_small 15.2 ms, 90.0" in wikitext.alt and "moe_small_8e" not in wikitext.alt
  assert [o.patch["encoding"]["y"]["scale"]["reverse"] for o in options] == [False, True, False]
  assert "dense_small" not in average.alt


def test_labels_cover_neither_each_other_nor_points():
  random = np.random.default_rng(0)
  points = {f"member_{i}": tuple(point) for i, point in enumerate(random.uniform((60, 40), (500, 280), (10, 2)))}
  points |= {"first": (280.0, 160.0), "second": (283.0, 160.0), "third": (280.0, 160.0)}
  placed = labels.place(points)
  boxes = [labels._box(points[name], name, tuple(place.values())) for name, place in placed.items()]
  assert all(labels.overlap(one, other) == 0 for one, other in itertools.combinations(boxes, 2))
  assert all(box[0] >= 0 and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT for box in boxes)
  for box, point in itertools.product(boxes, points.values()):
    assert not (box[0] < point[0] < box[2] and box[1] < point[1] < box[3])


def test_overlap_is_the_shared_area():
  assert labels.overlap((0, 0, 4, 3), (2, 1, 9, 9)) == 4.0
  assert labels.overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0.0


def test_a_patch_merges_objects_deletes_with_null_and_replaces_the_rest():
  before = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
  assert patched(before, {"a": {"b": None, "c": [3]}, "e": {"f": 1}}) == {"a": {"c": [3]}, "d": 4, "e": {"f": 1}}
  assert before == {"a": {"b": 1, "c": [1, 2]}, "d": 4}


def test_loss_is_a_figure_for_each_pair_against_time_tokens_or_flops(comparison, metrics_of):
  metrics = {member["name"]: metrics_of(member) for member in comparison["members"]}
  small, large = loss_curves(from_json(comparison), metrics)
  assert list(small.drawings()) == ["loss_time_dense_small", "loss_tokens_dense_small", "loss_flops_dense_small"]
  assert "moe_small_16e" in small.alt and "dense_large" not in small.alt and "dense_large" in large.alt
  time, tokens, flops, _, _ = small.choices[0].options
  assert "after 18.2 s" in time.alt and "after 2.46M tokens" in tokens.alt and "FLOPs" in flops.alt
  last = [row for row in small.spec["data"]["values"] if row["member"] == "moe_small_8e"][-1]
  member = comparison["members"][1]
  assert last["step"] == member["steps"] and last["tokens"] == pytest.approx(member["tokens"], rel=1e-4)
  assert last["time_s"] == pytest.approx(member["steps"] * member["step_time_s"], rel=1e-4)
  assert last["elapsed_s"] == pytest.approx(last["time_s"], rel=1e-4)
  assert last["flops"] == pytest.approx(last["tokens"] * member["model_flops_per_token"], rel=1e-4)
  assert last["raw"] == pytest.approx(metrics["moe_small_8e"][-1]["loss"], rel=1e-4)


def test_loss_curves_show_every_seed(comparison, metrics_of):
  member = comparison["members"][0]
  runs = [member["name"], f"{member['name']}-seed1"]
  comparison = {**comparison, "members": [{**member, "runs": runs}, *comparison["members"][1:]]}
  (figure,) = loss_curves(from_json(comparison), {runs[0]: metrics_of(member), runs[1]: metrics_of(member)[:200]})
  points = {run: [row for row in figure.spec["data"]["values"] if row["run"] == run] for run in runs}
  assert all({row["member"] for row in rows} == {runs[0]} for rows in points.values())
  assert len(points[runs[0]]) > len(points[runs[1]]) > 0
  finals = [points[run][-1]["loss"] for run in runs]
  assert f"{member['name']} {sum(finals) / 2:.3f}" in figure.alt


@pytest.mark.parametrize("points", [1, 2, 3])
def test_loss_curves_of_runs_that_just_began(comparison, metrics_of, points):
  comparison = {**comparison, "members": comparison["members"][:2], "pairs": comparison["pairs"][:1]}
  dense, moe = comparison["members"]
  both = {dense["name"]: metrics_of(dense), moe["name"]: metrics_of(moe)[:points]}
  alone = {moe["name"]: metrics_of(moe)[:points]}
  for metrics, members in ((both, {dense["name"], moe["name"]}), (alone, {moe["name"]})):
    (figure,) = loss_curves(from_json(comparison), metrics)
    assert {row["member"] for row in figure.spec["data"]["values"]} == members
  assert loss_curves(from_json(comparison), {}) == []


@pytest.mark.parametrize(("layers", "experts"), [(1, 8), (6, 16), (32, 128)])
def test_expert_load_has_a_panel_for_each_layer_and_a_bounded_number_of_cells(comparison, layers, experts):
  moe = {**comparison["members"][1], "pair": "dense_small"}
  comparison = {"suite": "s", "members": [comparison["members"][0], moe], "pairs": []}
  random = np.random.default_rng(0).dirichlet(np.ones(experts), (200, layers))
  metrics = [{"step": 5 * i, "router/load": load.tolist()} for i, load in enumerate(random)]
  figures = expert_load(from_json(comparison), {moe["name"]: metrics, "dense_small": []})
  assert list(figures) == ["moe_small_8e"]
  rows = figures["moe_small_8e"].spec["data"]["values"]
  assert {row["layer"] for row in rows} == {f"sparse layer {layer + 1}" for layer in range(layers)}
  assert {row["expert"] for row in rows} == set(range(experts))
  assert len(rows) <= max(1.1 * CELLS, 12 * layers * experts)
  cells = [row["load"] for row in rows if row["layer"] == "sparse layer 1" and row["expert"] == 0]
  assert np.mean(cells) == pytest.approx(random[:, 0, 0].mean() * experts, rel=0.05)


def test_a_drawing_of_expert_load_names_its_layers(comparison, metrics_of):
  read = from_json(comparison)
  moe = comparison["members"][1]
  figure = expert_load(read, {moe["name"]: metrics_of(moe)[:8]})[moe["name"]]
  svg, _ = draw(figure.spec, figure.title, "", palette.variables(read))
  assert {"layer 2", "layer 4", "training step", "expert"} <= set(texts(svg))


def test_equal_data_give_equal_bytes(comparison):
  read = from_json(comparison)
  one, other = (draw(speed_accuracy(read).spec, "t", "A statement.", palette.variables(read)) for _ in range(2))
  assert one == other


def test_the_time_of_a_run_by_cause_adds_up_in_seconds_and_in_shares(comparison):
  lost = {"input_s": 2.0, "stalled_s": 1.0, "evaluation_s": 4.0, "save_s": 0.5, "restore_s": 0.0}
  assert time_by_cause(from_json(comparison)) is None
  members = comparison["members"]
  for member in members[:2]:
    member |= {f"goodput/{cause}": seconds for cause, seconds in lost.items()} | {"goodput/fraction": 0.7}
  members[1] |= {"parent_time_s": 5.0, "parent_counts": True}
  figure = time_by_cause(from_json(comparison))
  rows = figure.spec["data"]["values"]
  for i, member in enumerate(members[:2]):
    seconds = {row["cause"]: row["seconds"] for row in rows if row["member"] == member["name"]}
    assert seconds["useful steps"] == pytest.approx(member["train_time_s"] - 3.0, rel=1e-5)
    assert sum(seconds.values()) == pytest.approx(member["train_time_s"] + 4.5 + 5.0 * i, rel=1e-5)
    assert sum(row["share"] for row in rows if row["member"] == member["name"]) == pytest.approx(1.0, abs=1e-5)
    assert seconds.get("parent of an upcycled candidate") == (5.0 if i else None) and "restoring" not in seconds
  assert {row["member"] for row in rows} == {member["name"] for member in members[:2]}
  assert list(figure.drawings()) == ["time_by_cause_seconds", "time_by_cause_share"]
  for colors in map(lambda dark: palette.variables(from_json(comparison), dark), (False, True)):
    svg, png = draw(figure.drawings()["time_by_cause_seconds"], figure.title, "", colors)
    assert "waiting for input" in texts(svg) and "var(--" not in svg and png.startswith(b"\x89PNG")


def test_routers_of_every_seed_have_figures(comparison, metrics_of):
  moe = comparison["members"][1]
  moe["runs"] = [moe["name"], f"{moe['name']}-seed1"]
  metrics = {run: metrics_of(moe) for run in moe["runs"]}
  for make in (routing, expert_load):
    figures = make(from_json(comparison), metrics)
    assert list(figures) == moe["runs"]
    drawings = [name for figure in figures.values() for name in figure.drawings()]
    assert len(set(drawings)) == len(drawings)


def test_routing_shows_entropy_drops_and_every_auxiliary_loss_of_each_sparse_member(comparison, metrics_of):
  metrics = {member["name"]: metrics_of(member) for member in comparison["members"]}
  figures = routing(from_json(comparison), metrics)
  assert list(figures) == [member["name"] for member in comparison["members"] if member["kind"] == "moe"]
  (choice,) = figures["moe_small_8e"].choices
  words = " ".join(option.alt for option in choice.options)
  assert "entropy of router probabilities (nats) over" in words
  for told in ("fraction of choices dropped", "load balance loss", "router z loss"):
    assert f"{told} over training. Mean over the last tenth: " in words
  assert "last tenth: layer 2 0.013" in words and "last tenth: all layers 4.9" in words
  assert " z loss" not in words.replace("router z loss", "")  # that of the logits is another
  assert all(re.fullmatch(r"routing_moe_small_8e_\w+", name) for name in figures["moe_small_8e"].drawings())
  json.dumps(figures["moe_small_8e"].spec, allow_nan=False)


def test_the_sparsity_plots_name_every_mode_and_show_the_layers_at_the_default_threshold():
  def row(mode, active, increase, **more):
    scores = {"sciq/acc": 0.3 - increase, "sciq/acc_stderr": 0.02}
    speed = {"1": 300 / active, "16": 2000.0}
    return {"mode": mode, "active_fraction": active, "perplexity_increase": increase, "tokens_per_s": speed,
            "tasks": scores} | more  # fmt: skip

  heads = "attention_experts_above_threshold"
  used = {"experts_per_token": [4.0, 8.0], "experts_per_token_stdev": [1.0, 2.0]}
  used |= {heads: [3.0, 4.0], f"{heads}_stdev": [0.5, 0.0]}
  more_used = used | {"experts_per_token": [12.0, 16.0]}
  rows = [row("all", 1.0, 0.0), row("threshold:0.24", 0.7, 0.001, **more_used)]
  rows += [row("threshold:0.48", 0.45, 0.01, **used), row("top_k:4", 0.4, 0.05)]
  found = {"num_experts": 32, "attention_experts": 4, "max_increase": 0.03, "chosen": "threshold:0.48", "modes": rows}
  trade_off, layers = sparsity_plots(found)
  drawn = texts(draw(trade_off.spec, trade_off.title, "", palette.LIGHT)[0])
  for mode in ("all", "threshold:0.24", "threshold:0.48", "top_k:4"):
    assert mode in trade_off.alt and mode in drawn
  assert "threshold:0.48 45% active, perplexity +1.0%" in trade_off.alt
  assert "sciq/acc" in drawn and "batch 1: all experts 300 tokens/s" in drawn
  assert "feed-forward: 12%, 25%; attention: 75%, 100%" in layers.alt and "threshold:0.48" in layers.alt
  assert {"feed-forward", "attention"} <= {*texts(draw(layers.spec, layers.title, "", palette.LIGHT)[0])}
  alone = [{key: value for key, value in row.items() if key not in ("tokens_per_s", "tasks")} for row in rows[::3]]
  (trade_off,) = sparsity_plots(found | {"chosen": "all", "modes": alone})
  assert "top_k:4 40% active" in trade_off.alt
