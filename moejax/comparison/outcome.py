"""Computes the content of comparison.json: every number of the report."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.comparison.budget import Allotment
from moejax.comparison.findings import finding, verdict
from moejax.comparison.match import Match
from moejax.comparison.measure import Timing
from moejax.comparison.record import GOODPUT, TASKS, Baselines, Comparison, MatchedPair, Member
from moejax.config.experiment import Experiment, Suite
from moejax.config.parameters import flops_per_token, flops_per_token_at, parameter_counts
from moejax.evaluation.held_out import HeldOut


def outcome(
  suite: Suite,
  timings: Mapping[str, Timing],
  matches: list[Match],
  allotments: list[Allotment],
  summaries: Mapping[str, Mapping[str, Any]],
  held_out: Mapping[str, HeldOut],
  baselines: Baselines,
  provenance: Mapping[str, Any],
) -> Comparison:
  """Returns members, pairs and the finding. Values of members that are not in `summaries` or `held_out` are None.

  Args:
    suite: the suite.
    timings: timing of each member.
    matches: the candidate with the closest step time of each pair.
    allotments: budget of each member.
    summaries: summary.json of each trained member.
    held_out: scores of each trained member by document.
    baselines: n-gram baselines of the text.
    provenance: provenance of the comparison.
  """
  experiments = {experiment.name: experiment for experiment in suite.members}
  matched = {name for match in matches for name in (match.dense, match.moe)}
  members = [
    _member(experiments[a.name], a, timings[a.name], summaries.get(a.name, {}), a.name in matched) for a in allotments
  ]
  pairs = [_pair(match, held_out, suite.tolerance) for match in matches]
  return Comparison(
    suite=suite.name,
    tolerance=suite.tolerance,
    complete=all(a.name in summaries for a in allotments if a.trained),
    members=tuple(members),
    pairs=tuple(pairs),
    finding=finding(pairs),
    baselines=baselines,
    provenance=provenance,
  )


def _member(
  experiment: Experiment, allotment: Allotment, timing: Timing, summary: Mapping[str, Any], matched: bool
) -> Member:
  model, parameters = experiment.model, parameter_counts(experiment.model)
  # As trained where it was, which is what was counted for the budget but for rows beyond `EXACT_ROWS`.
  tokens = summary.get("tokens", allotment.tokens)
  tokens_per_s = tokens / allotment.steps / timing.step_time_s
  flops = flops_per_token_at(model, experiment.data.sequence_length, timing.choices_per_token)
  return Member(
    name=experiment.name,
    kind="moe" if model.moe else "dense",
    pair=allotment.pair,
    matched=matched,
    parameters_total=parameters.total,
    parameters_active=parameters.active,
    parameters_embedding=parameters.embedding,
    model_flops_per_token=flops_per_token(model, experiment.data.sequence_length),
    tokens_per_step=tokens / allotment.steps,
    step_time_s=timing.step_time_s,
    step_time_spread=timing.step_time_spread,
    tokens_per_s=tokens_per_s,
    mfu=tokens_per_s * flops / timing.peak_flops if timing.peak_flops else None,
    dropped_fraction=timing.dropped_fraction,
    budget_s=allotment.budget_s,
    steps=allotment.steps,
    tokens=tokens,
    bits_per_byte=summary.get("held_out/bits_per_byte"),
    bits_per_byte_stderr=summary.get("held_out/bits_per_byte_stderr"),
    accuracy=summary.get("held_out/accuracy"),
    accuracy_stderr=summary.get("held_out/accuracy_stderr"),
    tasks={name: value for name, value in summary.items() if name.startswith(TASKS)},
    goodput={f"{GOODPUT}{name}": value for name, value in summary.get("goodput", {}).items()},
    seed=experiment.training.seed,
    train_time_s=summary.get("train_time_s"),
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
    sparse_every=model.moe.every if model.moe else None,
  )


def _pair(match: Match, held_out: Mapping[str, HeldOut], tolerance: float) -> MatchedPair:
  difference = None
  if match.dense in held_out and match.moe in held_out:
    difference = held_out[match.moe].minus(held_out[match.dense])
  return MatchedPair(
    dense=match.dense,
    moe=match.moe,
    step_time_ratio=match.step_time_ratio,
    within_tolerance=match.within_tolerance,
    verdict=verdict(match, difference, tolerance),
    **({} if difference is None else dataclasses.asdict(difference)),
  )
