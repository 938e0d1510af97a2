"""Computes the content of comparison.json: every number of the report.

X = runs with different seeds  Y = documents
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.comparison.against import Results, accuracy, bits, matched_pair
from moejax.comparison.budget import Allotment
from moejax.comparison.findings import finding
from moejax.comparison.learning_rates import chosen, method
from moejax.comparison.match import Match
from moejax.comparison.measurements import Measurements, Timing
from moejax.comparison.record import GOODPUT, TASKS, Baselines, Comparison, Member, Tried
from moejax.comparison.shorter_budgets import with_shorter_budgets
from moejax.comparison.stages import Result
from moejax.comparison.statistics import Scores, SeedVariance, seed_variance
from moejax.config.experiment import Experiment, Suite
from moejax.config.parameters import flops_per_token, flops_per_token_at, parameter_counts
from moejax.config.upcycled import Upcycled
from moejax.data.ratio_estimate import ratio_stderr


def outcome(
  suite: Suite,
  measurements: Measurements,
  matches: list[Match],
  allotments: list[Allotment],
  results: Results,
  shorter: Mapping[float, Results],
  tried: Mapping[str, Sequence[Tried]],
  baselines: Baselines,
  provenance: Mapping[str, Any],
) -> Comparison:
  """Returns members, pairs and the finding. Values of members without results are None.

  Args:
    suite: the suite.
    measurements: step times of all members.
    matches: the candidate with the closest step time of each pair.
    allotments: budget of each member.
    results: results of the finished runs of each member, in the order of their seeds.
    shorter: results of the finished branches of each member, by the fraction of the budget.
    tried: results of the trials of learning rates of each member, if the suite has a sweep.
    baselines: n-gram baselines of the text.
    provenance: provenance of the comparison.
  """
  experiments = {experiment.name: experiment for experiment in suite.members}
  runs = {member.name: [run.name for run in pair.runs(member)] for pair in suite.pairs for member in pair.members}
  matched = {name for match in matches for name in (match.dense, match.moe)}
  finished = [results[name] for name in experiments if results.get(name)]
  seeds = seed_variance([bits(each) for each in finished]), seed_variance([accuracy(each) for each in finished])
  members = [
    dataclasses.replace(
      _member(
        experiments[a.name], a, measurements.timing(a.name), results.get(a.name, ()), seeds, runs[a.name], matched
      ),
      **_tuned(a.name, tried.get(a.name, ())),
      **_start(suite.upcycled.get(a.name), experiments[a.pair], results, shorter),
    )
    for a in allotments
  ]
  by_name = {member.name: member for member in members}
  pairs = [
    matched_pair(pair, match, by_name, measurements, results, seeds, suite.tolerance, shorter)
    for pair, match in zip(suite.pairs, matches, strict=True)
  ]
  pairs = [with_shorter_budgets(pair, shorter, by_name[pair.dense].budget_s or 0.0, suite.tolerance) for pair in pairs]
  return Comparison(
    suite=suite.name,
    tolerance=suite.tolerance,
    complete=all(len(results.get(a.name, ())) == len(runs[a.name]) for a in allotments if a.trained),
    members=tuple(members),
    pairs=tuple(pairs),
    finding=finding(pairs),
    bits_per_byte_seed_stddev=math.sqrt(seeds[0].variance) if seeds[0].degrees else None,
    seed_degrees_of_freedom=seeds[0].degrees,
    learning_rates=method(suite),
    baselines=baselines,
    provenance=provenance,
  )


def _tuned(name: str, tried: Sequence[Tried]) -> dict[str, Any]:
  """The chosen learning rate and the trials behind it. Empty without trials."""
  return {"learning_rate": chosen(name, tried), "learning_rate_trials": tuple(tried)} if tried else {}


def _start(
  start: Upcycled | None, dense: Experiment, results: Results, shorter: Mapping[float, Results]
) -> dict[str, Any]:
  """How an upcycled candidate of a dense member starts, and what the training of its parent took."""
  if start is None:
    return {}
  whole = start.parent_fraction == 1.0
  of_parent = (results if whole else shorter.get(start.parent_fraction, {})).get(dense.name, ())
  summaries = [result.summary for result in of_parent]
  tokens = _mean(summaries, "tokens")
  return {
    "start": start.start,
    "parent": dense.name if whole else dense.branch_name(start.parent_fraction),
    "parent_counts": start.count_parent,
    "parent_time_s": _mean(summaries, "train_time_s"),
    "parent_tokens": tokens,
    "parent_flops": tokens and tokens * flops_per_token(dense.model, dense.data.sequence_length),
  }


def _member(
  experiment: Experiment,
  allotment: Allotment,
  timing: Timing,
  results: Sequence[Result],
  seeds: tuple[SeedVariance, SeedVariance],
  runs: Sequence[str],
  matched: set[str],
) -> Member:
  model, parameters = experiment.model, parameter_counts(experiment.model)
  summaries = [result.summary for result in results]
  # As trained where it was, which is what was counted for the budget but for rows beyond `EXACT_ROWS`.
  tokens = summaries[0]["tokens"] if summaries else allotment.tokens
  tokens_per_s = tokens / allotment.steps / timing.step_time_s
  flops = flops_per_token_at(model, experiment.data.sequence_length, timing.choices_per_token)
  by_run = [float(score) for score in bits(results).by_seed] if results else []
  return Member(
    name=experiment.name,
    kind="dense" if model.is_dense else "moe",
    pair=allotment.pair,
    matched=experiment.name in matched,
    parameters_total=parameters.total,
    parameters_active=parameters.active,
    parameters_embedding=parameters.embedding,
    model_flops_per_token=flops_per_token(model, experiment.data.sequence_length),
    tokens_per_step=tokens / allotment.steps,
    step_time_s=timing.step_time_s,
    step_time_interval_s=timing.step_time_interval_s,
    step_time_spread=timing.step_time_spread,
    tokens_per_s=tokens_per_s,
    mfu=tokens_per_s * flops / timing.peak_flops if timing.peak_flops else None,
    dropped_fraction=timing.dropped_fraction,
    load_max_over_mean=timing.load_max_over_mean,
    dropped_fraction_trained=_mean([result.routers for result in results], "dropped_fraction_trained"),
    load_max_over_mean_trained=_mean([result.routers for result in results], "load_max_over_mean_trained"),
    budget_s=allotment.budget_s,
    steps=allotment.steps,
    tokens=tokens,
    **(_scores("bits_per_byte", bits(results), seeds[0]) if results else {}),
    **(_scores("accuracy", accuracy(results), seeds[1]) if results else {}),
    tasks={name: _mean(summaries, name) for name in _keys(summaries) if name.startswith(TASKS)},
    goodput=_goodput(summaries),
    seed=experiment.training.seed,
    runs=tuple(runs[: len(results)]),
    bits_per_byte_by_run=tuple(by_run),
    train_time_s=_mean(summaries, "train_time_s"),
    compile_time_s=timing.compile_time_s,
    num_layers=model.num_layers,
    d_model=model.d_model,
    num_experts=model.moe.num_experts if model.moe else 0,
    experts_per_token=model.moe.experts_per_token if model.moe else 0,
    capacity_factor=model.moe.capacity_factor if model.moe and model.moe.has_capacity else None,
    dispatch=model.moe.dispatch.kind if model.moe else None,
    router=model.moe.router.kind if model.moe else None,
    feed_forward=model.feed_forward.kind,
    optimizer=experiment.optimizer.kind,
    learning_rate=experiment.optimizer.learning_rate,
    sparse_every=model.moe.every if model.moe else None,
    depths=model.depths.kind,
    depths_share=model.depths.share if model.depths.is_routed else None,
  )


def _scores(name: str, scores: Scores, seeds: SeedVariance) -> dict[str, Any]:
  """A score and its standard error over documents and, if it is known, over seeds."""
  stderr = ratio_stderr(scores.numerators_XY.mean(axis=0), scores.denominators_Y)
  if seeds.degrees:
    stderr = math.hypot(stderr, math.sqrt(seeds.variance / len(scores.by_seed)))
  return {name: scores.value, f"{name}_stderr": stderr}


def _goodput(summaries: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
  """Goodput, and lost seconds by cause."""
  found = [summary.get("goodput", {}) for summary in summaries]
  return {f"{GOODPUT}{name}": _mean([{name: 0.0} | each for each in found], name) for name in _keys(found)}


def _keys(records: Sequence[Mapping[str, Any]]) -> list[str]:
  return list(dict.fromkeys(key for record in records for key in record))


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
  """Mean over runs. None if a run does not have the value."""
  values: list[Any] = [record.get(name) for record in records]
  return statistics.fmean(values) if values and None not in values else None
