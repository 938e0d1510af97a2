"""What comparison.json says of each candidate and its dense model: differences with intervals, and outcomes."""

from typing import Any

from moejax.comparison import quantities
from moejax.comparison.page_tables import Cell, Table
from moejax.comparison.quantities import MISSING
from moejax.comparison.record import Against, Comparison, MatchedPair, known

BASES = {"time": "equal training time", "tokens": "equal active parameters and tokens", "flops": "equal training FLOPs"}
EQUAL_TIME = {
  # Text, and whether it is good.
  "established": ("✓ training times equal within {}", True),
  "violated": ("✗ training times not equal within {}", False),
  "not established": ("not established that training times are equal within {}", False),
}


def candidates(comparison: Comparison) -> list[tuple[MatchedPair, Against]]:
  """Each candidate with its pair. In a file without candidates, the pair itself has the numbers of its match."""
  return [(pair, one) for pair in comparison.pairs for one in pair.candidates or (pair,) if one.moe]


def interval(record: Any, key: str) -> tuple[float, float] | None:
  """The interval of a number at 95 %, or None if it is unknown."""
  ends = getattr(record, f"{key}_interval")
  return (ends[0], ends[1]) if ends is not None and all(map(known, ends)) else None


def written(record: Any, key: str, scale: float = 1.0, signed: bool = True, unit: str = "") -> str:
  """A number and its interval: +0.161 (+0.102 to +0.220)."""
  value = getattr(record, key)
  if not known(value):
    return MISSING
  sign, digits = "+" if signed else "", 3 if scale == 1 else 2
  text = f"{value * scale:{sign}.{digits}f}"
  if ends := interval(record, key):
    text += f" ({ends[0] * scale:{sign}.{digits}f} to {ends[1] * scale:{sign}.{digits}f})"
  return f"{text} {unit}".strip().replace("-", "\N{MINUS SIGN}")


def equal_time(pair: MatchedPair, tolerance: str) -> tuple[str, bool]:
  """Whether the times of a pair are equal, in words, and whether that is established."""
  if pair.equal_time in EQUAL_TIME:
    text, good = EQUAL_TIME[pair.equal_time]
    return text.format(tolerance), good
  within = pair.within_tolerance
  if within is None:
    return "not matched yet", False
  return (f"{'✓' if within else '✗'} step times {'' if within else 'not '}equal within {tolerance}", bool(within))


def facts(pair: MatchedPair) -> list[tuple[str, str, str]]:
  """Names, values and words of a pair, for its card."""
  found = [("Outcome", str(pair.outcome), "")] if pair.outcome else []
  found.append(("Step-time ratio", written(pair, "step_time_ratio", signed=False), "MoE / dense"))
  if known(pair.whole_run_ratio):
    whole = quantities.ratio(pair.whole_run_ratio)
    found.append(("Whole-run ratio", whole, "training time as measured, MoE / dense"))
  found.append(("Bits per byte", written(pair, "bits_per_byte_difference"), "fewer are better"))
  points = written(pair, "accuracy_difference", 100.0, unit="points")
  return [*found, ("Accuracy", points, "more is better")]


def candidates_table(comparison: Comparison) -> Table:
  """One row per candidate: its differences from the dense model of its pair, with their intervals."""
  heads = (
    "Candidate", "Dense model", "Step-time ratio", "Whole-run ratio", "Equal time", "Bits per byte", "Detectable",
    "Accuracy, points", "Outcome",
  )  # fmt: skip
  rows = []
  for pair, one in candidates(comparison):
    whole, detectable = one.whole_run_ratio, one.bits_per_byte_detectable
    within = {True: "within the tolerance", False: "not within the tolerance", None: MISSING}
    equal = one.equal_time or within[one.within_tolerance]
    rows.append(
      (
        Cell(str(one.moe), below="; ".join(one.notes) or None),
        Cell(pair.dense),
        Cell(written(one, "step_time_ratio", signed=False), one.step_time_ratio),
        Cell(quantities.ratio(whole), whole),
        Cell(str(equal)),
        Cell(written(one, "bits_per_byte_difference"), one.bits_per_byte_difference),
        Cell(f"{detectable:.3f}" if known(detectable) else MISSING, detectable),
        Cell(written(one, "accuracy_difference", 100.0), one.accuracy_difference),
        Cell(str(one.outcome or MISSING)),
      )
    )
  return Table("candidates", "Candidates against their dense model", heads, tuple(rows))


def fairness_table(comparison: Comparison) -> Table | None:
  """The same comparison at equal time, tokens and FLOPs, or None if the file does not have it."""
  rows = []
  for pair, one in candidates(comparison):
    for basis in one.bases:
      equal, factor = str(basis.equal), basis.factor
      rows.append(
        (
          Cell(str(one.moe), below=f"against {pair.dense}"),
          Cell(BASES.get(equal, equal), below=basis.note),
          Cell(_amount(equal, basis.at), basis.at),
          Cell(written(basis, "bits_per_byte_difference"), basis.bits_per_byte_difference),
          Cell(str(basis.outcome or MISSING)),
          Cell(written(basis, "factor", signed=False), factor),
        )
      )
  heads = (
    "Candidate",
    "Fair by",
    "At",
    "Bits per byte, MoE minus dense",
    "Outcome",
    "Factor at equal loss, dense / MoE",
  )
  return Table("fairness", "Three kinds of fairness", heads, tuple(rows)) if rows else None


def shorter_budgets_table(comparison: Comparison) -> Table | None:
  """The comparison after shorter budgets and the whole one, or None if there are no shorter ones."""
  rows = []
  for pair, one in candidates(comparison):
    for shorter in one.shorter_budgets:
      rows.append(
        (
          Cell(str(one.moe), below=f"against {pair.dense}"),
          Cell(quantities.percent(shorter.budget, 0), shorter.budget),
          Cell(quantities.duration(shorter.budget_s), shorter.budget_s),
          Cell(quantities.ratio(shorter.bits_per_byte_dense), shorter.bits_per_byte_dense),
          Cell(quantities.ratio(shorter.bits_per_byte), shorter.bits_per_byte),
          Cell(written(shorter, "bits_per_byte_difference"), shorter.bits_per_byte_difference),
          Cell(str(shorter.outcome or MISSING)),
        )
      )
  heads = ("Candidate", "Of the budget", "Time", "Bits per byte, dense", "Bits per byte, MoE", "Difference", "Outcome")
  return Table("shorter-budgets", "Shorter budgets", heads, tuple(rows)) if rows else None


def _amount(equal: str, value: Any) -> str:
  return quantities.duration(value) if equal == "time" else quantities.count(value)
