"""The speed-accuracy curve: speed or cost of each member against its bits per byte, accuracy and benchmark scores."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moejax.comparison.findings import with_certainty
from moejax.comparison.palette import member_colors
from moejax.comparison.plots import labels
from moejax.comparison.plots.figure import (
  HEIGHT,
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
  scales,
  shown,
  told,
)
from moejax.comparison.quantities import duration, with_stderr
from moejax.comparison.record import Against, Comparison, Member, candidates, equal_names, known, task_keys
from moejax.evaluation.tasks import ACCURACIES

ROLES = ("dense", "MoE, equal step time", "MoE, closest but not shown equal", "MoE, other candidate")
SHAPES = {"dense": "circle", "moe": "diamond"}


@dataclasses.dataclass(frozen=True)
class Measure:
  """The quantity on the y axis."""

  key: str
  label: str
  caption: str
  scale: float = 1.0
  unit: str = ""
  reversed: bool = False


MEASURES = (
  Measure("bits_per_byte", "bits per byte (axis reversed)", "bits per byte of held-out text", reversed=True),
  Measure("accuracy", "next-token accuracy (%)", "next-token accuracy on held-out text", scale=100.0, unit="%"),
)

AXES = (
  ("step_time", "step time"), ("train_time", "training time of the whole run (s)"), ("tokens_per_s", "tokens/s"),
  ("parameters_active", "active parameters"), ("parameters_total", "total parameters"),
  ("flops", "model FLOPs of training"), ("tokens", "training tokens"),
)  # fmt: skip
"""Fields of the data and titles of the x axis."""


def task_measures(comparison: Comparison) -> list[Measure]:
  """A measure for each benchmark of a member, and for their average."""
  return [_task_measure(key) for key in task_keys(comparison)]


def _task_measure(key: str) -> Measure:
  _, name, metric = key.split("/")
  words = metric.replace("_", " ")
  if metric.startswith(ACCURACIES):
    return Measure(key, f"{name}: {words} (%)", f"{words} of {name}", scale=100.0, unit="%")
  if "perplexity" in metric or metric == "bits_per_byte":
    return Measure(key, f"{name}: {words} (axis reversed)", f"{words} of {name}", reversed=True)
  return Measure(key, f"{name}: {words}", f"{words} of {name}")


def role(member: Member, equal: set[str]) -> str:
  """What a member is in its pair."""
  if member.kind == "dense":
    return ROLES[0]
  if not member.matched:
    return ROLES[3]
  return ROLES[1] if member.name in equal else ROLES[2]


def speed_accuracy(comparison: Comparison) -> Figure | None:
  """The figure, with each measure that at least one member has, or None if there is none."""
  unit, per_unit = _unit(comparison)
  options = []
  for measure in (*MEASURES, *task_measures(comparison)):
    rows = _rows(comparison, measure, per_unit)
    if rows:
      options.append(_option(comparison, measure, rows))
  if not options:
    return None
  colors, equal = member_colors(comparison), equal_names(comparison)
  entries = [Entry(m.name, colors[m.name], role(m, equal), not m.matched) for m in comparison.members]
  titles = {field: f"{title} ({unit})" if field == "step_time" else title for field, title in AXES}
  held = {key for option in options for row in option.patch["data"]["values"] for key in row if row[key] is not None}
  across = tuple(
    Option(title, {"encoding": {"x": {"field": field, "axis": {"title": title}}}})
    for field, title in titles.items()
    if field in held
  )
  return Figure(
    name="speed_accuracy",
    title="Quality against speed",
    alt=str(options[0].alt),
    caption="Against step time, up and to the left is better. Error bars of candidates are the "
    "95 % intervals of their differences from their dense model, over seeds and documents. A gray line joins the "
    "members of a pair; hollow marks are candidates that are not the match.",
    spec=patched(_spec(entries, titles["step_time"]), options[0].patch),
    choices=(Choice("Quality", tuple(options)), Choice("Against", across), scales("linear", "log")),
    legend=tuple(entries),
    statement=with_certainty(comparison.finding),
  )


def _unit(comparison: Comparison) -> tuple[str, float]:
  times = [member.step_time_s for member in comparison.members if known(member.step_time_s)]
  return ("s", 1.0) if times and min(times) >= 1.0 else ("ms", 1e3)


def _rows(comparison: Comparison, measure: Measure, per_unit: float) -> list[dict[str, Any]]:
  """A row for each member whose step time and measure are known."""
  equal, against = equal_names(comparison), candidates(comparison)
  rows = []
  for member in comparison.members:
    value, step_time_s = member.number(measure.key), member.step_time_s
    if not known(value) or not known(step_time_s):
      continue
    stderr = member.number(f"{measure.key}_stderr")
    low, high = _ends(value, stderr, measure, against.get(member.name))
    train_time_s, tokens, flops = member.train_time_s, member.tokens, member.train_flops
    rows.append(
      {
        "member": member.name, "pair": member.pair, "kind": member.kind, "matched": member.matched,
        "role": role(member, equal), "value": rounded(value * measure.scale),
        "low": rounded(low * measure.scale), "high": rounded(high * measure.scale),
        "shown": with_stderr(value, stderr, scale=measure.scale, unit=measure.unit),
        "step_time": rounded(step_time_s * per_unit), "step_time_shown": duration(step_time_s),
        "train_time": rounded(train_time_s + member.counted("time_s")) if known(train_time_s) else None,
        "tokens": rounded(tokens + member.counted("tokens")) if known(tokens) else None,
        "flops": rounded(flops + member.counted("flops")) if flops else None,
      }
      | {
        field: rounded(number) if known(number := getattr(member, name)) else None
        for field, name in (
          ("tokens_per_s", "tokens_per_s"), ("parameters_active", "parameters_active"),
          ("parameters_total", "parameters_total"),
        )
      }
    )  # fmt: skip
  return rows


def _ends(value: float, stderr: float | None, measure: Measure, against: Against | None) -> tuple[float, float]:
  """The ends of an error bar: for a candidate, those of the interval of its difference from its dense model, which the
  verdict states. A benchmark has one standard error."""
  if measure in MEASURES:
    ends = getattr(against, f"{measure.key}_difference_interval", None)
    difference = getattr(against, f"{measure.key}_difference", None)
    if ends is None or None in ends or not known(difference):
      return value, value
    return value + ends[0] - difference, value + ends[1] - difference
  error = stderr if known(stderr) else 0.0
  return value - error, value + error


def _option(comparison: Comparison, measure: Measure, rows: list[dict[str, Any]]) -> Option:
  across = labels.pixels([row["step_time"] for row in rows], WIDTH)
  down = labels.pixels([row["value"] * (1 if measure.reversed else -1) for row in rows], HEIGHT)
  places = labels.place({row["member"]: point for row, point in zip(rows, zip(across, down, strict=True), strict=True)})
  listed = "; ".join(f"{row['member']} {row['step_time_shown']}, {row['shown']}" for row in rows)
  name = "speed_accuracy" if measure.key == "accuracy" else f"speed_{measure.key.replace('/', '_')}"
  y = axis("value", measure.label, padding=26, reverse=measure.reversed)
  return Option(
    measure.caption,
    {"data": {"values": [row | places[row["member"]] for row in rows]}, "encoding": {"y": y}},
    file=name,
    alt=f"Step time against {measure.caption}. {listed}.",
  )


def _spec(entries: Sequence[Entry], title: str) -> Spec:
  color = {
    "field": "member",
    "type": "nominal",
    "scale": palette(entries),
    "legend": {"title": None, "symbolType": "square", "symbolFillColor": None},
  }
  shape = {"field": "kind", "type": "nominal", "scale": {"domain": [*SHAPES], "range": [*SHAPES.values()]}}
  full = {"condition": {"test": "datum.matched", "value": 0.9}, "value": 0}
  lines = [
    told("member", "member"),
    told("role", "role"),
    told("step_time_shown", "step time"),
    told("shown", "quality"),
  ]
  return {
    "width": WIDTH,
    "height": HEIGHT,
    "params": [HIDDEN],
    "transform": [shown("member")],
    "encoding": {"x": axis("step_time", title, padding=56), "color": color},
    "layer": [
      {
        "mark": {"type": "line", "color": "var(--band)", "strokeWidth": 7, "strokeCap": "round"},
        "transform": [{"filter": "datum.matched"}],
        "encoding": {"detail": {"field": "pair"}, "color": {"value": "var(--band)"}},
      },
      {"mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": {"y": {"field": "low"}, "y2": {"field": "high"}}},
      {
        "mark": {"type": "point", "filled": False, "size": 130, "strokeWidth": 2.2},
        "params": [ZOOM],
        "encoding": {"shape": shape | {"legend": None}, "fill": color | {"legend": None}, "fillOpacity": full,
                     "tooltip": lines},
      },
      {
        "mark": {"type": "text", "baseline": "middle", "dx": {"expr": "datum.dx"}, "dy": {"expr": "datum.dy"},
                 "align": {"expr": "datum.align"}},
        "encoding": {"text": {"field": "member"}, "color": {"value": "var(--ink)"}},
      },
    ],
  }  # fmt: skip
