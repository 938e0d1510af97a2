"""Differences of candidates from their dense models, and ratios of step time, with the intervals of the verdict."""

from typing import Any

from moejax.comparison.findings import with_certainty
from moejax.comparison.palette import member_colors
from moejax.comparison.plots.figure import (
  HIDDEN,
  WIDTH,
  ZOOM,
  Choice,
  Entry,
  Figure,
  Option,
  Spec,
  axis,
  palette,
  patched,
  rounded,
  shown,
  told,
)
from moejax.comparison.record import Comparison, known
from moejax.comparison.statement import candidates, interval, written

MEASURES = (
  ("bits_per_byte_difference", "bits per byte, MoE minus dense (left: MoE better)", 1.0, 0.0),
  ("accuracy_difference", "accuracy in points, MoE minus dense (right: MoE better)", 100.0, 0.0),
  ("step_time_ratio", "step time, MoE / dense", 1.0, 1.0),
)
"""Key, title of the axis, scale, and the value at which both models are equal."""


def differences(comparison: Comparison) -> Figure | None:
  """A row for each candidate, with a choice of the measure, or None if no candidate has one."""
  options = []
  for key, title, scale, equal in MEASURES:
    rows = [_row(comparison, key, scale, equal, pair, one) for pair, one in candidates(comparison)]
    rows = [row for row in rows if row["value"] is not None]
    if rows:
      listed = "; ".join(f"{row['member']} {row['shown']}" for row in rows)
      patch = {"data": {"values": rows}, "encoding": {"x": {"axis": {"title": title}}}}
      options.append(Option(title.partition(",")[0], patch, file=key, alt=f"{title}. {listed}."))
  if not options:
    return None
  colors = member_colors(comparison)
  members = {member.name: member for member in comparison.members}
  names = dict.fromkeys(one.moe for _, one in candidates(comparison))
  entries = [Entry(name, colors[name], hollow=not members[name].matched) for name in names if name in members]
  return Figure(
    name="differences",
    title="Candidates against their dense model",
    alt=str(options[0].alt),
    caption="Bars are intervals at 95 %. Where a bar crosses the line, the models may be equal. For step times, the "
    "band is the tolerance: times are equal if the whole bar is in it.",
    spec=patched(_spec(entries, MEASURES[0][1]), options[0].patch),
    choices=(Choice("Quantity", tuple(options)),),
    legend=tuple(entries),
    statement=with_certainty(comparison.finding),
  )


def _row(comparison: Comparison, key: str, scale: float, equal: float, pair: Any, one: Any) -> dict[str, Any]:
  value, ends = getattr(one, key), interval(one, key)
  low, high = ends or (value, value)
  band = comparison.tolerance if key == "step_time_ratio" else 0.0
  return {
    "member": one.moe, "pair": pair.dense, "outcome": str(one.outcome or "no outcome yet"),
    "value": rounded(value * scale) if known(value) else None, "shown": written(one, key, scale, signed=equal == 0),
    "low": rounded(low * scale) if known(low) else None, "high": rounded(high * scale) if known(high) else None,
    "equal": equal, "from": rounded(equal / (1 + band)), "to": rounded(equal * (1 + band)),
  }  # fmt: skip


def _spec(entries: list[Entry], title: str) -> Spec:
  color = {"field": "member", "type": "nominal", "scale": palette(entries), "legend": None}
  y = {"field": "member", "type": "nominal", "sort": [entry.series for entry in entries], "axis": {"title": None}}
  return {
    "width": WIDTH,
    "height": max(80, 34 * len(entries)),
    "params": [HIDDEN],
    "transform": [shown("member")],
    "encoding": {"x": axis("value", title, padding=20), "y": y, "color": color},
    "layer": [
      {
        "mark": {"type": "rect", "opacity": 0.6},
        "encoding": {"x": {"field": "from"}, "x2": {"field": "to"}, "color": {"value": "var(--band)"}},
      },
      {
        "mark": {"type": "tick", "thickness": 2, "bandSize": 34},
        "encoding": {"x": {"field": "equal"}, "color": {"value": "var(--muted)"}},
      },
      {"mark": {"type": "rule", "strokeWidth": 3}, "encoding": {"x": {"field": "low"}, "x2": {"field": "high"}}},
      {
        "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
        "params": [ZOOM | {"select": ZOOM["select"] | {"encodings": ["x"]}}],
        "encoding": {
          "tooltip": [told("member", "candidate"), told("pair", "dense model"), told("shown", "difference"),
                      told("outcome", "outcome")],
        },
      },
    ],
  }  # fmt: skip
