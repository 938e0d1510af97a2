"""Suites, headlines and their average."""

import math

import pytest

from moejax.errors import UserError
from moejax.evaluation.tasks import SUITES, Benchmark, average, benchmarks, check_named, flat, headlines

RESULTS = {
  "results": {
    "arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.03, "acc_norm,none": 0.6},
    "webqs": {"exact_match,none": 0.1, "exact_match_stderr,none": 0.04, "sample_len": 7},
    "wikitext": {"word_perplexity,none": 30.0, "word_perplexity_stderr,none": "N/A"},
    "mine": {"acc,none": 1, "acc_stderr,none": math.nan},
    "group": {"alias": "a group without a number"},
    "empty": {"alias": "no number at all"},
  },
  "group_subtasks": {"group": ["inner", "mine"], "inner": ["arc_easy"], "webqs": []},
}


def scores(*names):
  return headlines(RESULTS, benchmarks(names))


def test_core_en_has_the_papers_shots():
  shots = {benchmark.name: benchmark.few_shot for benchmark in SUITES["core_en"]}
  assert sorted(shots.values()) == [0] * 10 + [1, 1, 5, 8]
  assert (shots["triviaqa"], shots["webqs"], shots["mmlu"], shots["gsm8k_cot"]) == (1, 1, 5, 8)


def test_a_task_by_itself_is_asked_as_in_its_suite_and_each_only_once():
  assert benchmarks(["webqs"]) == [Benchmark("webqs", 1, "exact_match,none")]
  assert benchmarks(["mine", "core_en", "webqs"])[:2] == [Benchmark("mine"), SUITES["core_en"][0]]
  assert len(benchmarks(["mine", "core_en", "webqs"])) == 15


def test_headlines_are_the_suites_metric_or_the_first_with_its_error():
  found = scores("arc_easy", "wikitext", "mine")
  assert (found["arc_easy"].value, found["arc_easy"].stderr, found["arc_easy"].metric) == (0.5, 0.03, "acc,none")
  assert (found["wikitext"].value, found["wikitext"].stderr) == (30.0, None)
  assert (found["mine"].value, found["mine"].stderr) == (1.0, None)
  with pytest.raises(UserError, match="empty has no score in alias"):
    scores("empty")


def test_a_group_without_a_score_stands_for_its_tasks():
  assert list(scores("group")) == ["arc_easy", "mine"]


def test_the_average_is_of_accuracies_and_its_error_of_all_of_theirs():
  mean = average(scores("arc_easy", "webqs", "wikitext"))
  assert mean.value == pytest.approx(0.3) and mean.stderr == pytest.approx(0.025)
  assert average(scores("arc_easy", "mine")).stderr is None
  assert average(scores("wikitext")) is None


def test_flat_scores_are_numbers_by_name():
  assert flat(scores("webqs", "wikitext")) == {
    "webqs/exact_match": 0.1, "webqs/exact_match_stderr": 0.04, "wikitext/word_perplexity": 30.0,
    "average/accuracy": 0.1, "average/accuracy_stderr": 0.04,
  }  # fmt: skip


def test_asking_nothing_names_the_option_and_the_suites():
  with pytest.raises(UserError, match=r"give --tasks with a suite \(core_en\)"):
    check_named(())
  check_named(("arc_easy",))
