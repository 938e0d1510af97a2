"""Compares each candidate of a pair with its dense model: step time, training time, quality, and other bases.

X = runs with different seeds  Y = documents
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.comparison import judgement
from moejax.comparison.bases import Runs, bases
from moejax.comparison.findings import verdict
from moejax.comparison.match import Match
from moejax.comparison.measurements import Measurements
from moejax.comparison.record import Against, MatchedPair, Member
from moejax.comparison.stages import Result
from moejax.comparison.statistics import Difference, Scores, SeedVariance, differences
from moejax.config.experiment import Pair
from moejax.evaluation.held_out import NATS_PER_BIT

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
  shorter: Mapping[float, Results],
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
    shorter: results of the runs of shorter budgets, by the fraction of the whole budget.
  """
  dense = pair.dense.name
  trained = [name for name in (c.name for c in pair.candidates) if results.get(name) and results.get(dense)]
  of_pair = [result for of in (results, *shorter.values()) for name in (dense, *trained) for result in of.get(name, ())]
  _check_same_text(of_pair)
  by_bits, by_accuracy = (
    differences(of(results[dense]), {name: of(results[name]) for name in trained}, variance) if trained else {}
    for of, variance in zip((bits, accuracy), seeds, strict=True)
  )
  runs = Runs(members, results, bits, seeds[0], tolerance, shorter)
  candidates = tuple(
    _against(members[dense], members[c.name], measurements, runs, by_bits, by_accuracy) for c in pair.candidates
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
  runs: Runs,
  by_bits: Mapping[str, Difference],
  by_accuracy: Mapping[str, Difference],
) -> Against:
  tolerance = runs.tolerance
  ratio = measurements.ratio(dense.name, member.name)
  low, high = judgement.limits(tolerance)
  whole = None
  if dense.train_time_s and member.train_time_s:
    whole = (member.train_time_s + member.counted("time_s")) / dense.train_time_s
  found = Against(
    moe=member.name,
    step_time_ratio=ratio.value,
    step_time_ratio_interval=ratio.interval,
    within_tolerance=low <= ratio.value <= high,
    whole_run_ratio=whole,
    equal_time=judgement.equal_time(ratio, whole, tolerance),
    parameters_active_ratio=(member.parameters_active or 0) / (dense.parameters_active or 1),
    start=member.start,
    **_quality(by_bits.get(member.name), by_accuracy.get(member.name)),
  )
  if member.name in by_bits:
    found = dataclasses.replace(found, bases=bases(runs, dense.name, member.name, by_bits[member.name]))
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
