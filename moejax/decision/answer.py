"""A decision in words and as plain values."""

import math
from typing import Any

from moejax.decision.decide import DAY_S, Decision
from moejax.decision.serving import SEQUENCES

FAR = 100.0
"""Factors beyond this are not spelled out."""


def headline(decision: Decision) -> str:
  """The answer as one sentence."""
  winner, other = decision.winner, decision.dense if decision.winner is decision.sparse else decision.sparse
  where = f"{decision.chips:,} {decision.topology.chip.name}"
  spent = money(decision.budget.money(decision.chips))
  return (
    f"{winner.name} wins against {other.name} after {_days(decision.budget.days)} on {where}{spent}, probability "
    f"{decision.certainty:.2f}"
  )


def sentences(decision: Decision) -> list[str]:
  """What the answer rests on, what would change it, and what it costs."""
  low, middle, high = decision.gap
  found = [
    f"the loss of the MoE is {abs(middle):.3f} nats per token {'below' if middle > 0 else 'above'} that of the dense "
    f"model (80 % interval of the gap {low:+.3f} to {high:+.3f})",
    _speedup(decision),
    _break_even(decision),
    _turning(decision),
    _serving(decision),
  ]
  return [sentence for sentence in found if sentence]


def _speedup(decision: Decision) -> str:
  low, middle, high = decision.speedup
  if decision.equal is None or not math.isfinite(middle):
    return "no dense candidate is expected to reach the loss of the MoE within 64 times the budget"
  interval = f"80 % interval {low:.2g} to {'above 64' if not math.isfinite(high) else f'{high:.2g}'}"
  cost = decision.budget.money(decision.chips, decision.budget.days * (middle - 1))
  saved = "" if cost is None else f", which {'saves' if cost >= 0 else 'costs'} {abs(cost):,.0f}"
  return (
    f"the dense candidates take {middle:.2g} times as long to reach the loss of the MoE ({interval}){saved}; "
    f"{decision.equal.name} reaches it first"
  )


def _break_even(decision: Decision) -> str:
  return f"break-even: {decision.break_even.words(lambda seconds: _days(seconds / DAY_S))}"


def _turning(decision: Decision) -> str:
  """What would make the other kind more likely to be better."""
  reasons, days, slowdown = [], decision.turning_days, decision.turning_slowdown
  if decision.turning_load is not None and decision.turning_load < FAR:
    reasons.append(f"the load of the busiest device exceeds {decision.turning_load:.2g} times the mean")
  if slowdown is not None and slowdown < FAR:
    change = "more" if slowdown > 1 else "less"
    reasons.append(f"a step of the MoE takes {change} than {slowdown:.2g} times its predicted time")
  if days is not None:
    side = "under" if days < decision.budget.days else "over"
    reasons.append(f"the budget is {side} {_days(days)}")
  against = [one.law.name for one in decision.laws if (one.probability > 0.5) != (decision.probability > 0.5)]
  if against:
    reasons.append(f"the law {' or the law '.join(against)} is right")
  return f"the answer turns if {', or '.join(reasons)}" if reasons else "nothing that was varied turns the answer"


def _serving(decision: Decision) -> str:
  sparse, dense = decision.serving[decision.sparse.name], decision.serving[(decision.equal or decision.dense).name]
  ratio = sparse.device_seconds_per_token / dense.device_seconds_per_token
  text = (
    f"serving {SEQUENCES} sequences at a time, the MoE costs {ratio:.2g} times as much per token as "
    f"{(decision.equal or decision.dense).name} and needs {_gib(sparse.memory_bytes)} instead of "
    f"{_gib(dense.memory_bytes)} ({'roofline, corrected by measured runs' if decision.measured else 'roofline'})"
  )
  tokens = decision.break_even_tokens
  return text if tokens is None else f"{text}; both cost the same in total after {tokens:.2g} served tokens"


def money(amount: float | None) -> str:
  return "" if amount is None else f" for {amount:,.0f}"


def _gib(size: float) -> str:
  gib = size / 2**30
  return f"{gib:,.0f} GiB" if gib >= 10 else f"{gib:.2g} GiB"


def _days(days: float) -> str:
  if days < 0.1:
    return f"{days * 24 * 60:.2g} minutes"
  return f"{days:.3g} day{'' if f'{days:.3g}' == '1' else 's'}"


def as_json(decision: Decision) -> dict[str, Any]:
  """The content of `moejax decide --json FILE`."""
  sparse = decision.sparse
  return {
    "answer": headline(decision),
    "sentences": sentences(decision),
    "notes": list(decision.notes),
    "winner": "moe" if decision.winner is sparse else "dense",
    "probability_moe_better": decision.probability,
    "topology": decision.topology.name,
    "slices": decision.topology.slices,
    "chips": decision.chips,
    "days": decision.budget.days,
    "price_per_chip_hour": decision.budget.price_per_chip_hour,
    "cost": decision.budget.money(decision.chips),
    "dense": decision.dense.name,
    "moe": sparse.name,
    "gap_nats": list(decision.gap),
    "speedup": [value if math.isfinite(value) else None for value in decision.speedup],
    "dense_with_equal_loss": decision.equal and decision.equal.name,
    "break_even_days": decision.break_even_days,
    "better_until_days": decision.break_even.until and decision.break_even.until / DAY_S,
    "turning_days": decision.turning_days,
    "turning_slowdown": decision.turning_slowdown,
    "turning_load": decision.turning_load,
    "break_even_tokens": decision.break_even_tokens,
    "step_time_error": {"common": decision.clock.common, "ratio": decision.clock.ratio},
    "laws": [
      {"name": one.law.name, "source": one.law.source, "caution": one.law.caution, "weight": one.weight,
       "error_nats": one.law.error, "error_source": one.law.error_source,
       "probability_moe_better": one.probability, "gap_nats": one.gap, "outside_range": one.outside}
      for one in decision.laws
    ],
    "budgets": list(decision.curve),
    "measured_decoding": [one.to_json() for one in decision.measured],
    "serving": {name: one.to_json() for name, one in decision.serving.items()},
    "candidates": [one.to_json() for one in decision.candidates],
    "fit": decision.fitted and decision.fitted.to_json(),
  }  # fmt: skip
