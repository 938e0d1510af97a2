"""What the answer of a comparison rests on, what would change it, and what to do next, in plain words."""

from collections.abc import Mapping

from moejax.comparison import curves, quantities
from moejax.comparison.record import ESTABLISHED, VIOLATED, Comparison, Member, known

FEW_DOCUMENTS = 100
"""Number of held-out documents below which the report asks for more."""
MANY_DROPPED = 0.1
"""Fraction of dropped choices above which the report mentions them."""


def rests_on(comparison: Comparison, metrics: Mapping[str, curves.Metrics]) -> list[tuple[str, str]]:
  """Names and values of the facts behind the answer."""
  trained = _trained(comparison)
  corpus = comparison.provenance.get("corpus")
  facts = [("Training seeds", _seeds(trained)), ("Held-out text", _held_out(comparison, metrics))]
  if isinstance(corpus, Mapping) and known(corpus.get("documents")):
    sizes = f", {quantities.count(corpus['bytes'])} bytes" if known(corpus.get("bytes")) else ""
    facts.append(("Training text", f"{quantities.whole(corpus['documents'])} documents{sizes}"))
  seconds = [_runs(member) * member.train_time_s for member in trained if known(member.train_time_s)]
  if seconds:
    runs = sum(map(_runs, trained))
    facts.append(("Training", f"{runs} runs, {quantities.duration(sum(seconds))} in all"))
  if comparison.learning_rates:
    facts.append(("Learning rates", comparison.learning_rates))
  device, count = comparison.provenance.get("device_kind"), comparison.provenance.get("device_count")
  if device:
    facts.append(("Devices", f"{count} x {device}" if known(count) else str(device)))
  return [(name, text) for name, text in facts if text]


def would_change(comparison: Comparison, metrics: Mapping[str, curves.Metrics]) -> list[str]:
  """The conditions that could turn the answer, from the numbers at hand."""
  trained = _trained(comparison)
  reasons = []
  unequal = [pair.dense for pair in comparison.pairs if pair.equal_time not in (None, ESTABLISHED)]
  if unequal:
    reasons.append(
      f"A candidate that is shown to have the step time of {_listed(unequal)}. Without one, the pair may compare two "
      "speeds and not two models of one speed."
    )
  if trained and max(map(_runs, trained)) == 1:
    reasons.append("Another training seed. One seed does not show how much results vary from run to run.")
  documents = _documents(metrics)
  if documents is not None and documents < FEW_DOCUMENTS:
    reasons.append(f"Other held-out text. {documents:,} documents are few, and one of them can weigh much.")
  dropped = [m.name for m in comparison.members if known(m.dropped_fraction) and m.dropped_fraction > MANY_DROPPED]
  if dropped:
    reasons.append(
      f"A higher capacity, or a dispatch that drops nothing: {_listed(dropped)} "
      f"dropped more than {MANY_DROPPED:.0%} of the choices of experts while the step was timed."
    )
  reasons += _of_learning_rates(comparison)
  if any(member.mfu is None for member in trained) and "cpu" in str(comparison.provenance.get("device_kind")).lower():
    reasons.append("Other hardware. Step times on a CPU say little about accelerators: see `moejax plan`.")
  reasons.append("Another scale or a longer budget. The answer holds for the models and the budget that were trained.")
  return reasons


def next_steps(comparison: Comparison, metrics: Mapping[str, curves.Metrics], lacking: list[str]) -> list[str]:
  """What to do, as sentences with commands."""
  if not comparison.complete:
    resume = "Run the same `moejax compare` command again. It resumes from the last finished stage"
    return [f"{resume}; {len(lacking)} parts are missing." if lacking else f"{resume}."]
  steps = []
  if any(pair.equal_time == VIOLATED for pair in comparison.pairs):
    steps.append(
      "Add candidates whose step time is closer: more or fewer experts per token, another `sparse_every`, or another "
      "width. `moejax match DENSE MOE --topology ...` proposes a width."
    )
  spread = [member.name for member in comparison.members if (member.step_time_spread or 0) > comparison.tolerance]
  if spread:
    steps.append(
      f"Measure longer or on a quieter machine: the step time of {_listed(spread)} varied by more than the tolerance. "
      "Use `--measurement.rounds`."
    )
  documents = _documents(metrics)
  if documents is not None and documents < FEW_DOCUMENTS:
    steps.append(
      "Evaluate on more held-out text: raise `--evaluation.max-tokens`, or name files in `--data.validation`."
    )
  if max(map(_runs, _trained(comparison)), default=2) == 1:
    steps.append("Train each member with several seeds: `seeds=2` of a `Pair` in the suite.")
  steps.append("Predict the step time at the scale that matters: `moejax plan NAME --topology v5p:4x8x8`.")
  return steps


def _of_learning_rates(comparison: Comparison) -> list[str]:
  """How other learning rates could turn the answer."""
  trained = _trained(comparison)
  swept = {member.name: [r for t in member.learning_rate_trials if known(r := t.learning_rate)] for member in trained}
  if not any(swept.values()):
    return ["A learning rate tuned for each member: `--learning-rates sweep`."] if trained else []
  ends = [m.name for m in trained if (rates := swept[m.name]) and m.learning_rate in (min(rates), max(rates))]
  if not ends:
    return []
  return [
    f"A wider sweep: the best learning rate of {_listed(ends)} is the lowest or the highest that was tried. Use "
    "`--learning-rates.factors`."
  ]


def _trained(comparison: Comparison) -> list[Member]:
  return [member for member in comparison.members if known(member.bits_per_byte)]


def _runs(member: Member) -> int:
  """The number of runs of a member, each with a seed of its own."""
  return len(member.runs) or 1


def _seeds(trained: list[Member]) -> str:
  counts = sorted({_runs(member) for member in trained})
  if not counts:
    return ""
  several = [member.name for member in trained if _runs(member) > 1]
  if len(counts) == 1:
    return f"{counts[0]} for each member"
  return f"{counts[0]} for each member, up to {counts[-1]} for {_listed(several)}"


def _documents(metrics: Mapping[str, curves.Metrics]) -> int | None:
  """The number of held-out documents of the last evaluation, if it is known."""
  found = [curves.series(rows, "held_out/documents")[1] for rows in metrics.values()]
  return min((int(documents[-1]) for documents in found if len(documents)), default=None)


def _held_out(comparison: Comparison, metrics: Mapping[str, curves.Metrics]) -> str:
  documents = _documents(metrics)
  if documents is None:
    return ""
  targets = [curves.series(rows, "held_out/targets")[1] for rows in metrics.values()]
  tokens = min((float(numbers[-1]) for numbers in targets if len(numbers)), default=None)
  text = f"{documents:,} documents, {quantities.count(tokens)} tokens"
  effective = [number for pair in comparison.pairs if known(number := pair.documents_effective)]
  return f"{text}; as informative as {min(effective):.0f} documents of equal size" if effective else text


def _listed(names: list[str]) -> str:
  return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
