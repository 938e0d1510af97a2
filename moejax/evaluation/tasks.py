"""Suites of benchmarks, and the main metric of each benchmark.

`core_en` follows the evaluation of arXiv 2405.15052: nine 0-shot and two 1-shot English tasks, MMLU 5-shot, GSM8K
8-shot. Its list of the nine 0-shot tasks is not public: BoolQ and OpenBookQA are our choice, the other seven are those
of a later paper by some of its authors. WikiText perplexity is what arXiv 2404.05567 reports beside its tasks.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A task or group of lm-evaluation-harness."""

  name: str
  few_shot: int | None = None
  """Number of few-shot examples. None uses the default of the harness."""
  metric: str | None = None
  """Metric and filter as named by the harness. None uses its first metric."""


SUITES: dict[str, tuple[Benchmark, ...]] = {
  "core_en": (
    Benchmark("arc_easy", 0, "acc,none"),
    Benchmark("arc_challenge", 0, "acc_norm,none"),
    Benchmark("hellaswag", 0, "acc_norm,none"),
    Benchmark("lambada_openai", 0, "acc,none"),
    Benchmark("piqa", 0, "acc,none"),
    Benchmark("sciq", 0, "acc,none"),
    Benchmark("winogrande", 0, "acc,none"),
    Benchmark("boolq", 0, "acc,none"),
    Benchmark("openbookqa", 0, "acc_norm,none"),
    Benchmark("triviaqa", 1, "exact_match,remove_whitespace"),
    Benchmark("webqs", 1, "exact_match,none"),
    Benchmark("mmlu", 5, "acc,none"),
    Benchmark("gsm8k_cot", 8, "exact_match,flexible-extract"),
    Benchmark("wikitext", 0, "word_perplexity,none"),
  ),
}
"""acc_norm divides the log-likelihood of a choice by its length in characters, as is usual for these three."""


ACCURACIES = ("acc", "exact_match")
"""Prefixes of metrics that are fractions of examples, so that they can be averaged over benchmarks."""


@dataclasses.dataclass(frozen=True)
class Score:
  """The main score of a benchmark."""

  value: float
  stderr: float | None
  metric: str
  """Metric and filter as named by the harness."""


def check_named(names: Sequence[str]) -> None:
  """Raises UserError if no benchmark is named."""
  if not names:
    raise UserError(
      "no benchmark is named, and evaluation.tasks of the run is empty; give --tasks with a suite "
      f"({', '.join(SUITES)})"
      " or with tasks of lm-evaluation-harness, such as --tasks arc_easy hellaswag"
    )


def benchmarks(names: Iterable[str]) -> list[Benchmark]:
  """The benchmarks that these names of suites and tasks stand for, without duplicates."""
  found = [benchmark for name in names for benchmark in SUITES.get(name, (Benchmark(name),))]
  known = {benchmark.name: benchmark for suite in SUITES.values() for benchmark in suite}
  # A task that is named individually is scored as in its suite.
  return list({b.name: known.get(b.name, b) for b in found}.values())


def requested_benchmarks(results: Mapping[str, Any]) -> list[Benchmark]:
  """The benchmarks in the content of a results.json."""
  return [Benchmark(**benchmark) for benchmark in results["benchmarks"]]


def headlines(results: Mapping[str, Any], chosen: Sequence[Benchmark]) -> dict[str, Score]:
  """The main score of each benchmark by name. For a group without a score, those of its tasks.

  Raises:
    UserError: If a benchmark has no score.
  """
  return {b.name: _headline(results["results"], b) for benchmark in chosen for b in _scored(results, benchmark)}


def average(scores: Mapping[str, Score]) -> Score | None:
  """The unweighted mean of the accuracies, with its standard error, or None if there are none."""
  accuracies = [score for score in scores.values() if score.metric.startswith(ACCURACIES)]
  if not accuracies:
    return None
  stderrs = [score.stderr for score in accuracies if score.stderr is not None]
  whole = len(stderrs) == len(accuracies)
  stderr = math.sqrt(sum(stderr**2 for stderr in stderrs)) / len(accuracies) if whole else None
  return Score(sum(score.value for score in accuracies) / len(accuracies), stderr, "accuracy")


def flat(scores: Mapping[str, Score]) -> dict[str, float]:
  """NAME/METRIC and NAME/METRIC_stderr of every benchmark, and `average/accuracy`."""
  mean = average(scores)
  values = {}
  for name, score in {**scores, **({"average": mean} if mean else {})}.items():
    key = f"{name}/{score.metric.partition(',')[0]}"
    values[key] = score.value
    if score.stderr is not None:
      values[f"{key}_stderr"] = score.stderr
  return values


def _scored(results: Mapping[str, Any], benchmark: Benchmark) -> list[Benchmark]:
  """The benchmark or, for a group without a score, its members."""
  children = results["group_subtasks"].get(benchmark.name) or []
  if children and not _metrics(results["results"].get(benchmark.name, {})):
    return [b for child in children for b in _scored(results, Benchmark(child, metric=benchmark.metric))]
  return [benchmark]


def _metrics(numbers: Mapping[str, Any]) -> list[str]:
  """Metrics that have a value, by their names in the harness."""
  return [name for name, value in numbers.items() if "," in name and "_stderr," not in name and _is_number(value)]


def _headline(results: Mapping[str, Any], benchmark: Benchmark) -> Score:
  numbers = results[benchmark.name]
  metrics = _metrics(numbers)
  if not metrics:
    raise UserError(f"{benchmark.name} has no score in {', '.join(numbers)}")
  metric = next((name for name in metrics if name == benchmark.metric), metrics[0])
  stderr = numbers.get(metric.replace(",", "_stderr,", 1))
  return Score(float(numbers[metric]), float(stderr) if _is_number(stderr) else None, metric)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
