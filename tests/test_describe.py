"""What `show` and `list` print."""

import io
import json
import shlex
from dataclasses import replace

import pytest
from rich.console import Console

from moejax.config import Budget
from moejax.config.plain import to_plain
from moejax.describe import experiment_page, facts, list_page, scores_page, suite_facts, suite_page
from moejax.evaluation.tasks import Score
from moejax.lookup import find_experiment
from moejax.overrides import override

MOST_FIELDS = {"quick_small": 126, "quick_small_8e": 148}
"""Of a dense and of a sparse experiment, as `moejax show` prints them; 17 of them are rules of logical axes, and 4 the
precision of each kind of layer."""


def printed(page, width: int = 120) -> list[str]:
  text = io.StringIO()
  Console(file=text, width=width).print(page, soft_wrap=True)
  return [line.rstrip() for line in text.getvalue().splitlines()]


def words(page) -> list[str]:
  """Its lines with single spaces."""
  return [" ".join(line.split()) for line in printed(page)]


def test_facts_are_plain_numbers_and_the_whole_configuration(tiny_moe):
  numbers = facts(tiny_moe)
  assert numbers.pop("config") == to_plain(tiny_moe)
  assert numbers == {
    "name": "sparse",
    "parameters_total": 8592,
    "parameters_active": 7824,
    "parameters_embedding": 4224,
    "parameters_multi_token": 0,
    "parameters_non_embedding": 4368,
    "parameters_active_non_embedding": 3600,
    "model_flops_per_token": 58_752,
    "tokens_per_step": 256,
    "steps": 672,  # 20 x 8592 / 256 = 671.25
    "tokens": 672 * 256,
    "training_flops": 672 * 256 * 58_752,
  }


def test_facts_of_a_suite_are_its_settings_and_those_of_its_members(tiny_suite):
  numbers = suite_facts(tiny_suite)
  assert numbers["name"] == "suite" and numbers["tolerance"] == 0.05 and numbers["train"] == "all"
  assert numbers["measurement"] == to_plain(tiny_suite.measurement)
  assert numbers["pairs"] == [{"dense": "dense", "candidates": ["sparse", "wide"], "seeds": 1, "upcycled": []}]
  assert numbers["members"] == [facts(member) for member in tiny_suite.members]
  assert json.loads(json.dumps(numbers))["members"][0]["config"]["data"]["train"] == ["python-standard-library"]


def test_an_experiments_page_has_its_counts_and_where_its_length_comes_from(tiny_moe):
  lines = words(experiment_page(tiny_moe))
  assert lines[:9] == [
    "sparse",
    "parameters 8,592",
    "active 7,824",
    "embedding 4,224",
    "non-embedding 4,368",
    "training FLOPs per token 58,752",
    "tokens per step 256",
    "budget 172,032 tokens, 672 steps of full sequences: 20 tokens per parameter (total)",
    "training FLOPs 1.011e+10",
  ]


@pytest.mark.parametrize(
  ("fields", "source"),
  [
    ({"steps": 5}, "budget 1,280 tokens, 5 steps of full sequences: as set"),
    (
      {"budget": Budget(tokens_per_parameter=2.5, parameters="active")},
      "budget 19,712 tokens, 77 steps of full sequences: 2.5 tokens per parameter (active)",
    ),
  ],
)
def test_a_page_says_whether_the_length_is_set_or_follows_from_a_budget(tiny_moe, fields, source):
  assert source in words(experiment_page(replace(tiny_moe, training=replace(tiny_moe.training, **fields))))


def test_every_field_is_printed_as_the_option_that_sets_it(tiny_moe):
  lines = printed(experiment_page(tiny_moe))
  options = [argument for line in lines if line.startswith("--") for argument in shlex.split(line)]
  assert "--model.moe.num-experts 4" in lines and "--rules.batch replica data expert" in lines
  moe = replace(tiny_moe.model.moe, d_ff=99, num_experts=8)
  other = replace(tiny_moe, model=replace(tiny_moe.model, d_ff=99, tie_embeddings=False, moe=moe))
  rules = (*other.rules, ("embed", ()), ("mlp", ()))
  assert override(replace(other, rules=rules), options) == tiny_moe


@pytest.mark.parametrize("name", ["quick_small", "quick_small_8e"])
def test_an_experiment_has_no_more_fields_than_a_user_can_read(name):
  fields = [line for line in printed(experiment_page(find_experiment(name))) if line.startswith("--")]
  assert len(fields) <= MOST_FIELDS[name], f"{len(fields)} fields: delete one, or argue for a new number"


def test_a_suites_page_has_its_members_side_by_side_and_its_settings(tiny_suite):
  lines = words(suite_page(tiny_suite))
  assert lines[0] == "suite"
  assert "dense dense 8,144 8,144 60,672 256" in lines
  assert "sparse dense 8,592 7,824 58,752 256" in lines
  assert [line for line in lines if " = " in line] == [
    "tolerance = 0.05",
    "train = all",
    "measurement.warmup_steps = 3",
    "measurement.rounds = 5",
    "measurement.max_rounds = None",
    "measurement.steps_per_round = 8",
    "learning_rates.kind = given",
  ]


def test_the_list_has_a_line_for_each_with_kind_and_size(tiny_dense, tiny_moe, tiny_suite):
  rows = [("suite", tiny_suite, "A comparison."), ("dense", tiny_dense, ""), ("sparse", tiny_moe, "member of suite")]
  lines = words(list_page(rows))
  assert "suite suite 3 members A comparison." in lines
  assert "dense dense 8.14k / 8.14k" in lines
  assert "sparse moe 8.59k / 7.82k member of suite" in lines


@pytest.mark.parametrize(
  ("fields", "short"),
  [
    ({"vocab_size": 1}, "3.94k"),  # 3920 parameters of layers, and 16 x vocab_size
    ({"vocab_size": 62_223}, "999k"),  # 999,488
    ({"vocab_size": 62_224}, "1M"),  # 999,504
    ({"vocab_size": 64_375_000}, "1.03B"),
    ({"num_layers": 17, "d_ff": 2_000_000_000}, "1.63T"),
  ],
)
def test_counts_have_three_digits_and_a_unit(tiny_dense, fields, short):
  model = replace(tiny_dense.model, **fields)
  assert f"dense dense {short} / {short}" in words(list_page([("dense", replace(tiny_dense, model=model), "")]))


def test_a_page_of_scores_says_how_each_benchmark_was_asked_a_group_as_the_sum_of_its_tasks():
  scores = {"sciq": Score(0.25, 0.0125, "acc,none"), "group": Score(31.5, None, "word_perplexity,none")}
  results = {
    "group_subtasks": {"sciq": [], "group": ["inner", "c"], "inner": ["a", "b"]},
    "n-samples": {"sciq": {"effective": 1000}, **{name: {"effective": 7} for name in "abc"}},
    "n-shot": {"sciq": 0, "a": 5, "b": 5, "c": 5},
  }
  lines = words(scores_page(scores, results))
  assert "sciq acc,none 0.2500 ± 0.0125 1,000 0" in lines
  assert "group word_perplexity,none 31.5000 21 5" in lines
  counts = {"sciq": (4000, 0), "a": (1500, 1400), "b": (7, 0), "c": (7, 2)}
  results["cut"] = {task: {"requests": requests, "cut": cut} for task, (requests, cut) in counts.items()}
  lines = words(scores_page(scores, results))
  assert "benchmark metric score examples shots cut" in lines
  assert "sciq acc,none 0.2500 ± 0.0125 1,000 0 0" in lines
  assert "group word_perplexity,none 31.5000 21 5 1,402/1,514" in lines
