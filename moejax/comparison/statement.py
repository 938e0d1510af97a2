"""What comparison.json says of each candidate and its dense model: differences with intervals, and outcomes."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.comparison import quantities
from moejax.comparison.page_tables import Cell, Table
from moejax.comparison.quantities import MISSING
from moejax.comparison.record import Comparison, MatchedPair, known

STDERRS = 1.96
"""Number of standard errors on each side of an interval at 95 %, for a file without intervals."""

BASES = {"time": "equal training time", "tokens": "equal tokens", "flops": "equal training FLOPs"}
EQUAL_TIME = {
  # Text, and whether it is good.
  "established": ("✓ training times equal within {}", True),
  "violated": ("✗ training times not equal within {}", False),
  "not established": ("not established that training times are equal within {}", False),
}


def given(record: Any, key: str) -> Any:
  """The value of `key`, which may be a field of the record, one of its other keys, or an item of an object."""
  if isinstance(record, Mapping):
    return record.get(key)
  value = getattr(record, key, None)
  return record.more.get(key) if value is None else value


def candidates(comparison: Comparison) -> list[tuple[MatchedPair, Any]]:
  """Each candidate with its pair. In a file without candidates, the pair itself tells of its match."""
  return [(pair, one) for pair in comparison.pairs for one in given(pair, "candidates") or (pair,) if given(one, "moe")]


def interval(record: Any, key: str) -> tuple[float, float] | None:
  """The interval of a number at 95 %."""
  ends = given(record, f"{key}_interval")
  if isinstance(ends, Sequence) and len(ends) == 2 and all(map(known, ends)):
    return ends[0], ends[1]
  value, stderr = given(record, key), given(record, f"{key}_stderr")
  return (value - STDERRS * stderr, value + STDERRS * stderr) if known(value) and known(stderr) else None


def written(record: Any, key: str, scale: float = 1.0, signed: bool = True, unit: str = "") -> str:
  """A number and its interval: +0.161 (+0.102 to +0.220)."""
  value = given(record, key)
  if not known(value):
    return MISSING
  sign, digits = "+" if signed else "", 3 if scale == 1 else 2
  text = f"{value * scale:{sign}.{digits}f}"
  if ends := interval(record, key):
    text += f" ({ends[0] * scale:{sign}.{digits}f} to {ends[1] * scale:{sign}.{digits}f})"
  return f"{text} {unit}".strip().replace("-", "\N{MINUS SIGN}")


def equal_time(pair: Any, tolerance: str) -> tuple[str, bool]:
  """Whether the times of a pair are equal, in words, and whether that is established."""
  if (found := given(pair, "equal_time")) in EQUAL_TIME:
    text, good = EQUAL_TIME[found]
    return text.format(tolerance), good
  within = given(pair, "within_tolerance")
  if within is None:
    return "not matched yet", False
  return (f"{'✓' if within else '✗'} step times {'' if within else 'not '}equal within {tolerance}", bool(within))


def facts(pair: Any) -> list[tuple[str, str, str]]:
  """Names, values and words of a pair, for its card."""
  found = [("Outcome", str(given(pair, "outcome")), "")] if given(pair, "outcome") else []
  found.append(("Step-time ratio", written(pair, "step_time_ratio", signed=False), "MoE / dense"))
  if known(given(pair, "whole_run_ratio")):
    whole = quantities.ratio(given(pair, "whole_run_ratio"))
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
    whole, detectable = given(one, "whole_run_ratio"), given(one, "bits_per_byte_detectable")
    within = {True: "within the tolerance", False: "not within the tolerance", None: MISSING}
    equal = given(one, "equal_time") or within[given(one, "within_tolerance")]
    rows.append(
      (
        Cell(given(one, "moe"), below="; ".join(given(one, "notes") or ()) or None),
        Cell(pair.dense),
        Cell(written(one, "step_time_ratio", signed=False), given(one, "step_time_ratio")),
        Cell(quantities.ratio(whole), whole),
        Cell(str(equal)),
        Cell(written(one, "bits_per_byte_difference"), given(one, "bits_per_byte_difference")),
        Cell(f"{detectable:.3f}" if known(detectable) else MISSING, detectable),
        Cell(written(one, "accuracy_difference", 100.0), given(one, "accuracy_difference")),
        Cell(str(given(one, "outcome") or MISSING)),
      )
    )
  return Table("candidates", "Candidates against their dense model", heads, tuple(rows))


def fairness_table(comparison: Comparison) -> Table | None:
  """The same comparison at equal time, tokens and FLOPs, or None if the file does not have it."""
  rows = []
  for pair, one in candidates(comparison):
    for basis in given(one, "bases") or ():
      equal, factor = str(given(basis, "equal")), given(basis, "factor")
      rows.append(
        (
          Cell(given(one, "moe"), below=f"against {pair.dense}"),
          Cell(BASES.get(equal, equal)),
          Cell(_amount(equal, given(basis, "at")), given(basis, "at")),
          Cell(written(basis, "bits_per_byte_difference"), given(basis, "bits_per_byte_difference")),
          Cell(str(given(basis, "outcome") or MISSING)),
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


def _amount(equal: str, value: Any) -> str:
  return quantities.duration(value) if equal == "time" else quantities.count(value)
