"""`moejax decide`: its answer, the search space, serving, and what it refuses."""

import json
import math
import re

import pytest

import moejax
from moejax import cli
from moejax.config import Experiment, GroupedDispatch
from moejax.config.chips import CHIPS
from moejax.config.parameters import full_sequence_steps, parameter_counts
from moejax.decision import page as decision_page
from moejax.decision.answer import as_json, headline, sentences
from moejax.decision.candidates import find_candidates
from moejax.decision.decide import DAY_S, Budget, clock_error, decide, make_budget
from moejax.decision.figures import decision_figures, drawn
from moejax.decision.page import as_html
from moejax.decision.search_space import Space, make_space, variants
from moejax.decision.serving import break_even_tokens, serving
from moejax.errors import UserError
from moejax.lookup import find_experiment
from moejax.planning.estimate import estimate
from moejax.planning.meshes import on_topology
from moejax.planning.topology import parse_topology

POD = parse_topology("v5p:4x8x8")
ONE_WIDTH = Space(width=(1.0,))


@pytest.fixture(autouse=True)
def without_library(monkeypatch):
  """Pages lack the library that draws their figures, which takes seconds to make."""
  monkeypatch.setattr(decision_page, "library", lambda: "")


@pytest.fixture(scope="module")
def decision():
  pair = [find_experiment(name) for name in ("dense_6b4", "moe_6b4_64e")]
  space = Space(width=(0.5, 1.0, 2.0), experts=(16, 64))
  return decide(pair, POD, Budget(days=21, price_per_chip_hour=4.0), space)


def test_the_answer_has_a_winner_a_probability_a_price_and_what_turns_it(decision):
  answer = headline(decision)
  assert answer.startswith(f"{decision.winner.name} wins against ") and "after 21 days on 256 v5p for 516,096" in answer
  assert f"probability {decision.certainty:.2f}" in answer and 0.5 <= decision.certainty <= 1
  text = " ".join(sentences(decision))
  for part in ("nats per token below", "times as long to reach", "the answer turns if", "served tokens", "roofline"):
    assert part in text, text
  assert decision.probability == pytest.approx(sum(one.weight * one.probability for one in decision.laws))


def test_all_numbers_are_in_the_json_and_the_page_is_self_contained(decision):
  stored = json.loads(json.dumps(as_json(decision), allow_nan=False))
  assert stored["answer"] == headline(decision) and len(stored["candidates"]) == 9
  days = [row["days"] for row in stored["budgets"]]
  assert days[len(days) // 2] == pytest.approx(21) and days == sorted(days)
  page = as_html(decision)
  assert "src=" not in page and "href=" not in page.replace('href="data:text/csv', "")
  assert headline(decision) in page and all(one.law.name in page for one in decision.laws)
  assert all(f"({one.law.error_source})" in page for one in decision.laws) and "our own choice" in page
  drawn = json.loads(re.search(r'<script type="application/json" id="figures">(.*)</script>', page)[1])["figures"]
  gap, probability = (drawn[f"decision_{name}"]["spec"]["data"]["values"] for name in ("gap", "probability"))
  assert [row["gap"] for row in gap] == pytest.approx([row["gap_nats"][1] for row in stored["budgets"]], abs=1e-3)
  assert [row["probability"] for row in probability] == pytest.approx(
    [row["probability"] for row in stored["budgets"]], abs=1e-3
  )


def test_figures_of_a_decision_are_drawn(decision):
  for figure in decision_figures(decision):
    svg, png = drawn(figure, "svg").decode(), drawn(figure, "png")
    assert svg.startswith("<svg") and figure.title in svg and png.startswith(b"\x89PNG") and "var(--" not in svg


def test_the_same_seed_gives_the_same_answer(decision):
  pair = [find_experiment(name) for name in ("dense_6b4", "moe_6b4_64e")]
  budget, space = Budget(days=21, price_per_chip_hour=4.0), Space(width=(0.5, 1.0, 2.0), experts=(16, 64))
  assert as_json(decide(pair, POD, budget, space)) == as_json(decision)


@pytest.mark.parametrize(
  ("dense", "moe", "chips"),
  [
    ("dense_6b4", "moe_6b4_64e", "4x8x8"),
    ("dense_12b6", "moe_12b6_64e", "4x8x8"),
    ("dense_29b6", "moe_29b6_64e", "8x8x8"),
  ],
)
def test_moe_models_win_at_the_scales_and_budgets_of_arxiv_2405_15052(dense, moe, chips):
  """The paper: at 6.4B, 12.6B and 29.6B, each with the compute-optimal time of the dense model, MoE is better."""
  pod = parse_topology(f"v5p:{chips}")
  pair = [find_experiment(dense), find_experiment(moe)]
  days = full_sequence_steps(pair[0]) * estimate(on_topology(pair[0], pod), pod).step_time_s / DAY_S
  found = decide(pair, pod, Budget(days=days), ONE_WIDTH)
  assert found.probability > 0.6 and found.gap[1] > 0


def test_the_speed_of_1b6_256e_is_predicted_within_the_interval():
  """2.06 times the speed of dense 6.4B, as notes on arXiv 2405.15052 say; its hardware and batch are not known."""
  times = [estimate(on_topology(find_experiment(name), POD), POD).step_time_s for name in ("dense_6b4", "moe_1b6_256e")]
  error = clock_error(POD, formula=True).ratio
  assert abs(math.log(times[0] / times[1] / 2.06)) < 1.2816 * error


def test_the_load_of_the_router_turns_the_answer_only_where_steps_wait_for_the_busiest_device():
  dispatch = {"model.moe.dispatch": GroupedDispatch(receive_factor=2.0), "model.moe.capacity_factor": 1.0}
  sparse = moejax.replace(find_experiment("moe_6b4_16e"), **dispatch)
  dropless, with_capacity = (
    decide([find_experiment("dense_6b4"), one], POD, Budget(days=21), ONE_WIDTH)
    for one in (sparse, find_experiment("moe_6b4_16e"))
  )
  assert with_capacity.turning_load is None
  assert dropless.turning_slowdown and dropless.turning_load and dropless.turning_load > dropless.turning_slowdown > 1
  assert "the load of the busiest device exceeds" in " ".join(sentences(dropless))


def test_the_price_is_hours_times_chips_times_the_price_of_an_hour():
  for slices, days, price in ((1, 21.0, 4.2), (4, 0.5, 0.0), (2, 3650.0, 1e-3)):
    topology = parse_topology("v5p:4x8x8", slices)
    budget = Budget(days=days, price_per_chip_hour=price)
    assert budget.money(256 * slices) == pytest.approx(days * 24 * 256 * slices * price)
    if price:
      again = make_budget(topology, None, budget.money(256 * slices), price)
      assert again.days == pytest.approx(days)
  assert Budget(days=1).money(256) is None


def test_a_load_that_changes_no_step_changes_no_answer(decision):
  """Its MoE has a capacity, so that steps do not wait for the busiest device."""
  assert decision.sparse.loaded_fraction == 0 and decision.turning_load is None
  assert "load of the busiest device" not in " ".join(sentences(decision))


def test_variants_keep_the_active_width_when_experts_are_divided_and_are_valid():
  sparse = find_experiment("moe_6b4_64e")
  space = Space(width=(0.5, 1.0), depth=(0.5, 1.0), granularity=(1, 4), every=(1, 2))
  found = dict(variants(sparse, space))
  assert len(found) == 16 and all(isinstance(one, Experiment) for one in found.values())
  base, fine = found["moe_6b4_64e, every 2"].model, found["moe_6b4_64e, granularity 4, every 2"].model
  assert (fine.moe.num_experts, fine.moe.experts_per_token, fine.moe.d_ff) == (256, 8, base.moe.d_ff // 4)
  router = sparse.model.d_model * sparse.model.num_sparse_layers * (256 - 64)
  assert parameter_counts(fine).total == parameter_counts(base).total + router
  half = found["moe_6b4_64e, width 0.5, every 2"].model
  assert half.d_model == base.d_model / 2 and half.num_heads == base.num_heads / 2 and half.d_ff == base.d_ff / 2
  assert found["moe_6b4_64e, depth 0.5, every 2"].model.num_layers == base.num_layers / 2
  refused = dict(variants(sparse, Space(width=(), top_k=(128,))))
  assert all(isinstance(one, UserError) for one in refused.values())


def test_depths_are_those_that_a_pattern_of_layers_divides():
  space = Space(width=(), depth=(0.3, 0.5, 0.7, 1.0, 1.3))
  for name in ("gemma3_12b", "gpt_oss_20b", "deepseek_v3", "llama4_maverick"):
    found = dict(variants(find_experiment(name), space))
    assert len(found) == 5 and all(isinstance(one, Experiment) for one in found.values()), name


def test_a_lower_precision_shortens_steps_of_dense_models_most():
  pair = [find_experiment(name) for name in ("dense_6b4", "moe_6b4_64e")]
  pod = parse_topology("v6e:16x16")
  found = find_candidates(pair, pod, Space(width=(1.0,), precision=("bfloat16", "int8")))
  times = {(one.is_dense, one.precision): one.step_time_s for one in found}
  gains = [times[kind, "bfloat16"] / times[kind, "int8"] for kind in (True, False)]
  assert gains[0] > gains[1] > 1


def test_serving_reads_the_weights_of_the_experts_that_a_batch_uses():
  dense, sparse = (find_experiment(name) for name in ("dense_6b4", "moe_6b4_64e"))
  chip = CHIPS["v5p"]
  one, many = serving(sparse, chip, sequences=1), serving(sparse, chip, sequences=512)
  assert one.device_seconds_per_token > many.device_seconds_per_token
  cache = 2 * 2 * 28 * 32 * 128 * 4096
  active = parameter_counts(sparse.model).active
  assert one.step_time_s * one.devices * chip.hbm_bandwidth == pytest.approx(2 * active + cache, rel=0.01)
  small, large = serving(dense, chip), serving(sparse, chip)
  assert large.memory_bytes > small.memory_bytes and large.devices > small.devices
  tokens = break_even_tokens(1e6, small, large)
  assert tokens == pytest.approx(1e6 / (large.device_seconds_per_token - small.device_seconds_per_token))
  assert break_even_tokens(-1e6, small, large) is None and break_even_tokens(1e6, large, small) is None


def command(*words: str) -> int:
  with pytest.raises(SystemExit) as stopped:
    cli.main(["decide", *words])
  return stopped.value.code


def test_the_command_writes_its_files_and_mistakes_are_one_line(tmp_path, capsys):
  pair = ["dense_6b4", "moe_6b4_64e", "--topology", "v5p:4x8x8"]
  files = ["--json", f"{tmp_path}/d.json", "--html", f"{tmp_path}/d.html"]
  budget = ["--money", "500000", "--price-per-chip-hour", "4"]
  assert command(*pair, *budget, "--width", "1", *files, "--training.batch-size", "2048") == 0
  stored = json.loads((tmp_path / "d.json").read_text())
  assert stored["days"] == pytest.approx(500_000 / (4 * 24 * 256)) and stored["cost"] == pytest.approx(500_000)
  assert {one["kind"]: one["tokens_per_step"] for one in stored["candidates"]} == {
    "dense": 1024 * 4096, "moe": 2048 * 4096,
  }  # fmt: skip
  out = capsys.readouterr().out
  assert stored["answer"] in out and stored["answer"] in (tmp_path / "d.html").read_text()
  for words, said in (
    ([], "decide needs NAME"),
    (pair[:2], "needs --topology"),
    (pair, "give a budget: either --days X, or --money X"),
    ([*pair, "--days", "1", "--money", "5"], "give a budget"),
    ([*pair, "--money", "5"], "needs --price-per-chip-hour X above 0"),
    ([*pair, "--money", "-5", "--price-per-chip-hour", "1"], "--money=-5 must be above 0 and finite"),
    ([*pair, "--money", "nan", "--price-per-chip-hour", "1"], "--money=nan must be above 0 and finite"),
    ([*pair, "--money", "1e9", "--price-per-chip-hour", "1e-9"], "--money=1e+09 buys 1.63e+14 days on v5p:4x8x8"),
    ([*pair, "--days", "1", "--price-per-chip-hour", "inf"], "must lie between 0 and 1e9"),
    ([*pair, "--days", "1.2e-5", "--width", "1"], "is 1.04 s, but one step of"),
    ([*pair, "--days", "1", "--width", "1", "--every", "1000"], "the nearest is 1000; use another --every or --depth"),
    (["quick_small", "quick_small_8e", *pair[2:], "--days", "1", "--width", "1"], "(its own: "),
    ([*pair, "--days", "-1"], "--days=-1 must lie between"),
    (["dense_6b4", *pair[2:], "--days", "1"], "needs a dense and an MoE experiment, but none is MoE"),
    ([*pair, "--days", "1", "--precision", "int4"], "--precision int4"),
    ([*pair, "--days", "1", "--width", "0"], "--width 0.0: a factor must lie between"),
    ([*pair, "--days", "1", "--width", "1", "--top-k", "500"], "no MoE variant fits on v5p:4x8x8"),
    ([*pair, "--days", "1", "--width", "1", "--seed", "-1"], "--seed=-1 must be 0 or above"),
    (["dense_6b4", *pair, "--days", "1"], "two experiments are named 'dense_6b4'"),
    (
      ["ds_dense_1b", "ds_moe_1b", *pair[2:], "--days", "1", "--width", "1"],
      "each token uses all experts of ds_moe_1b",
    ),
    ([*pair, "--days", "1", "--width", "1", "--runs", "/nowhere"], "/nowhere has no finished run"),
  ):
    assert command(*words) == 2, words
    err = capsys.readouterr().err
    assert said in err.splitlines()[-1] and err.splitlines()[-1].startswith("moejax: "), err


def test_the_search_space_of_python_calls_is_checked():
  assert make_space({"experts": [16], "width": [1]}) == Space(experts=(16,), width=(1,))
  for wrong, said in (
    ({"expert": [1]}, "has no 'expert'; it has width"),
    ({"experts": [1.5]}, "not a list of integers"),
    ({"width": 1.0}, "not a list of numbers"),
  ):
    with pytest.raises(UserError, match=said):
      make_space(wrong)  # type: ignore[arg-type]
