"""Compares each candidate of a pair with its dense model: step time, training time, quality, and other bases.

X = runs with different seeds  Y = documents  Z = points of a curve
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.comparison import fairness, judgement
from moejax.comparison.findings import verdict
from moejax.comparison.match import Match
from moejax.comparison.measurements import Measurements
from moejax.comparison.record import Against, Basis, MatchedPair, Member
from moejax.comparison.stages import Result
from moejax.comparison.statistics import Difference, Scores, SeedVariance, differences, ends
from moejax.config.experiment import Pair
from moejax.evaluation.held_out import NATS_PER_BIT

BASES = ("time", "tokens", "flops")

Results = Mapping[str, Sequence[Result]]
"""Results of the finished runs of each member."""


def bits(results: Sequence[Result]) -> Scores:
  """Bits per byte of the runs of a member."""
  nats_XY = np.stack([result.held_out.nats for result in results])
  return Scores(nats_XY / NATS_PER_BIT, results[0].held_out.text_bytes)


def accuracy(results: Sequence[Result]) -> Scores:
  """Next-token accuracy of the runs of a member."""
  return Scores(np.stack([result.held_out.correct for result in results]), results[0].held_out.targets)


def matched_pair(
  pair: Pair,
  match: Match,
  members: Mapping[str, Member],
  measurements: Measurements,
  results: Results,
  seeds: tuple[SeedVariance, SeedVariance],
  tolerance: float,
) -> MatchedPair:
  """A pair with all its candidates.

  Args:
    pair: the experiments.
    match: the candidate with the closest step time.
    members: members of the comparison by name.
    measurements: step times.
    results: results of the finished runs of each member.
    seeds: variance between seeds of bits per byte and of accuracy.
    tolerance: relative difference of times that are considered equal.
  """
  dense = pair.dense.name
  trained = [name for name in (c.name for c in pair.candidates) if results.get(name) and results.get(dense)]
  _check_same_text([result for name in (dense, *trained) for result in results.get(name, ())])
  by_bits, by_accuracy = (
    differences(of(results[dense]), {name: of(results[name]) for name in trained}, variance) if trained else {}
    for of, variance in zip((bits, accuracy), seeds, strict=True)
  )
  candidates = tuple(
    _against(members[dense], members[c.name], measurements, results, by_bits, by_accuracy, tolerance)
    for c in pair.candidates
  )
  outcome, best = judgement.pair_outcome(candidates, tolerance)
  nearest = next(candidate for candidate in candidates if candidate.moe == match.moe)
  documents = results[dense][0].held_out.text_bytes if results.get(dense) else np.zeros(0)
  found = MatchedPair(
    **{field.name: getattr(nearest, field.name) for field in dataclasses.fields(Against)} | {"outcome": outcome},
    dense=dense,
    best=best,
    candidates=candidates,
    documents=int((documents > 0).sum()) or None,
    documents_effective=float(np.square(documents.sum()) / np.square(documents).sum()) if documents.any() else None,
  )
  return dataclasses.replace(found, verdict=verdict(found, tolerance))


def _check_same_text(results: Sequence[Result]) -> None:
  """Raises ValueError if runs were scored on different text, since differences are paired by document."""
  if any(not np.array_equal(result.held_out.targets, results[0].held_out.targets) for result in results):
    raise ValueError("the runs of a pair were scored on different held-out text; evaluate all on the same text")


def _against(
  dense: Member,
  member: Member,
  measurements: Measurements,
  results: Results,
  by_bits: Mapping[str, Difference],
  by_accuracy: Mapping[str, Difference],
  tolerance: float,
) -> Against:
  ratio = measurements.ratio(dense.name, member.name)
  low, high = judgement.limits(tolerance)
  whole = None
  if dense.train_time_s and member.train_time_s:
    whole = member.train_time_s / dense.train_time_s
  found = Against(
    moe=member.name,
    step_time_ratio=ratio.value,
    step_time_ratio_interval=ratio.interval,
    within_tolerance=low <= ratio.value <= high,
    whole_run_ratio=whole,
    equal_time=judgement.equal_time(ratio, whole, tolerance),
    parameters_active_ratio=(member.parameters_active or 0) / (dense.parameters_active or 1),
    **_quality(by_bits.get(member.name), by_accuracy.get(member.name)),
  )
  if member.name in by_bits:
    found = dataclasses.replace(found, bases=_bases(dense, member, results, by_bits[member.name]))
  dropped = member.dropped_fraction if member.dropped_fraction_trained is None else member.dropped_fraction_trained
  rounds = measurements.rounds(dense.name, member.name)
  found = dataclasses.replace(found, notes=judgement.notes(found, dense.name, tolerance, dropped, rounds))
  return dataclasses.replace(found, outcome=judgement.outcome(found, tolerance))


def _quality(of_bits: Difference | None, of_accuracy: Difference | None) -> dict[str, Any]:
  """The differences in quality by field, or none before both members are trained."""
  if of_bits is None or of_accuracy is None:
    return {}
  return {
    "bits_per_byte_difference": of_bits.value,
    "bits_per_byte_difference_stderr": of_bits.stderr,
    "bits_per_byte_difference_interval": of_bits.interval,
    "bits_per_byte_detectable": of_bits.detectable if math.isfinite(of_bits.detectable) else None,
    "accuracy_difference": of_accuracy.value,
    "accuracy_difference_stderr": of_accuracy.stderr,
    "accuracy_difference_interval": of_accuracy.interval,
  }


def _bases(dense: Member, member: Member, results: Results, difference: Difference) -> tuple[Basis, ...]:
  """The comparison at equal time, tokens and FLOPs. Empty if a run has no training loss."""
  relative = {each.name: [result.relative_Z for result in results[each.name]] for each in (dense, member)}
  found, half = [], difference.high - difference.value
  for basis in BASES:
    curves = []
    for each in (dense, member):
      known = [relative_Z for relative_Z in relative[each.name] if relative_Z is not None]
      if len(known) == len(relative[each.name]):
        scores = [float(score) for score in bits(results[each.name]).by_seed]
        curves.append(fairness.curve(known, scores, _end(each, basis)))
    if len(curves) == 2:
      equal = fairness.equal(curves[0], curves[1], half)
      interval = ends(equal.difference - half, equal.difference + half)
      found.append(
        Basis(
          equal=basis,
          at=equal.at,
          bits_per_byte_difference=equal.difference,
          bits_per_byte_difference_interval=interval,
          outcome=judgement.better(interval),
          factor=equal.factor.value,
          factor_interval=equal.factor.interval,
        )
      )
  return tuple(found)


def _end(member: Member, basis: str) -> float:
  """Time, tokens or model FLOPs of a whole run."""
  tokens = member.tokens or 0.0
  return {
    "time": member.train_time_s or 0.0,
    "tokens": tokens,
    "flops": tokens * (member.model_flops_per_token or 0.0),
  }[basis]
