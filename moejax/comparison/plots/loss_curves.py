"""Training loss against time, tokens, FLOPs or steps: a figure for each pair."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from moejax.comparison import curves, quantities
from moejax.comparison.palette import member_colors
from moejax.comparison.plots.figure import (
  HEIGHT,
  HIDDEN,
  NEAREST,
  WIDTH,
  ZOOM,
  Choice,
  Entry,
  Figure,
  Option,
  Spec,
  axis,
  palette,
  rounded,
  scales,
  shown,
  told,
)
from moejax.comparison.record import Comparison, Member, dense_names, known, pair_members

SHOWN = 0.02
"""Part of a run, from its start, that is left out: the fall from chance would flatten everything after it."""
POINTS = 300
"""Points of a curve. The rest is between them."""


def loss_curves(comparison: Comparison, metrics: Mapping[str, curves.Metrics]) -> list[Figure]:
  """A figure for each pair that has metrics and step times."""
  figures = []
  for dense in dense_names(comparison):
    members = [m for m in pair_members(comparison, dense) if known(m.step_time_s) and known(m.tokens_per_step)]
    lines = {m.name: _line(m, metrics.get(m.name, ())) for m in members}
    drawn = [m for m in members if len(lines[m.name]["step"])]
    if drawn:
      figures.append(_figure(dense, drawn, lines, member_colors(comparison)))
  return figures


def _line(member: Member, metrics: curves.Metrics) -> dict[str, np.ndarray]:
  """Columns of the curve of a member: what may be on the x axis, and its loss, raw and smoothed."""
  steps, loss = curves.series(metrics, "loss")
  tokens = steps * (member.tokens_per_step or 0)
  line = {"step": steps, "time_s": steps * (member.step_time_s or 0), "tokens": tokens}
  if known(member.model_flops_per_token):
    line["flops"] = tokens * member.model_flops_per_token
  elapsed_s = _elapsed(metrics, steps)
  if elapsed_s is not None:
    line["elapsed_s"] = elapsed_s
  return line | {"raw": loss, "loss": curves.smooth(steps, loss)}


def _elapsed(metrics: curves.Metrics, steps: np.ndarray) -> np.ndarray | None:
  """Seconds of training up to each step, from the speed that was logged, or None if it was not logged."""
  timed, step_times_s = curves.series(metrics, "step_time_s")
  if len(timed) != len(steps) or not len(steps):
    return None
  return np.cumsum(np.diff(timed, prepend=0.0) * step_times_s)


def _figure(
  dense: str, members: Sequence[Member], lines: Mapping[str, Mapping[str, np.ndarray]], colors: Mapping[str, str]
) -> Figure:
  longest_s = max(lines[member.name]["time_s"][-1] for member in members)
  unit = quantities.time_unit(longest_s)
  entries = [Entry(m.name, colors[m.name], f"{lines[m.name]['loss'][-1]:.3f}", not m.matched) for m in members]
  rows = [row for member in members for row in _rows(member, lines[member.name], unit, SHOWN * longest_s)]

  def option(field: str, title: str, file: str | None = None) -> Option:
    patch = {"encoding": {"x": {"field": field, "axis": {"title": title}}}}
    return Option(title.partition(" (")[0], patch, file and f"loss_{file}_{quote(dense, safe='')}", alt(field))

  def alt(field: str) -> str:
    ends = "; ".join(f"{m.name} {lines[m.name]['loss'][-1]:.3f} after {_amount(m, lines, field)}" for m in members)
    return f"Training loss of the pair of {dense}. Smoothed at the end: {ends}."

  across = [option("time_s", f"training time ({unit}), steps x measured step time", "time")]
  across.append(option("tokens", "training tokens", "tokens"))
  if all("flops" in lines[member.name] for member in members):
    across.append(option("flops", "training FLOPs (model FLOPs)", "flops"))
  if all("elapsed_s" in lines[member.name] for member in members):
    across.append(option("elapsed_s", f"elapsed time of training ({unit}), as logged during the run"))
  across.append(option("step", "training step"))
  return Figure(
    name=f"loss_{quote(dense, safe='')}",
    title=f"Training loss: pair of {dense}",
    alt=str(across[0].alt),
    caption="Faint lines are the logged loss and bold lines its moving average. Dashed lines are candidates that are "
    f"not the match. The first {SHOWN:.0%} of training is not shown.",
    spec=_spec(entries, rows, str(across[0].patch["encoding"]["x"]["axis"]["title"])),
    choices=(Choice("Against", tuple(across)), scales("log", "linear")),
    legend=tuple(entries),
  )


def _amount(member: Member, lines: Mapping[str, Mapping[str, np.ndarray]], field: str) -> str:
  end = float(lines[member.name][field][-1])
  if field.endswith("_s"):
    return quantities.duration(end)
  return f"{quantities.count(end)} {'FLOPs' if field == 'flops' else f'{field}s'.replace('ss', 's')}"


def _rows(member: Member, line: Mapping[str, np.ndarray], unit: str, first_s: float) -> list[dict[str, Any]]:
  columns = dict(zip(line, curves.thin(*line.values(), points=POINTS), strict=True))
  for name in ("time_s", "elapsed_s"):
    if name in columns:
      columns[name] = columns[name] / quantities.SECONDS[unit]
  late = columns["time_s"] >= min(quantities.in_unit(first_s, unit), columns["time_s"][-1])
  rows = [dict(zip(columns, values, strict=True)) for values in zip(*(c[late] for c in columns.values()), strict=True)]
  return [
    {"member": member.name, "matched": member.matched} | {name: rounded(value, 5) for name, value in row.items()}
    for row in rows
  ]


def _spec(entries: Sequence[Entry], rows: list[dict[str, Any]], title: str) -> Spec:
  color = {
    "field": "member",
    "type": "nominal",
    "scale": palette(entries),
    "legend": {"title": None, "symbolType": "stroke"},
  }
  dashes = {"condition": {"test": "datum.matched", "value": [1, 0]}, "value": [6, 3]}
  loss = axis("loss", "training loss (nats per token)")
  lines = [
    told("member", "member"), told("loss", "loss, smoothed", ".4f"), told("raw", "loss", ".4f"),
    told("step", "step", ",.0f"), told("tokens", "tokens", ".4~s"),
  ]  # fmt: skip
  return {
    "width": WIDTH,
    "height": HEIGHT,
    "data": {"values": rows},
    "params": [HIDDEN],
    "transform": [shown("member")],
    "encoding": {"x": axis("time_s", title, type="log"), "color": color},
    "layer": [
      {
        "mark": {"type": "line", "strokeWidth": 0.8, "opacity": 0.35, "clip": True},
        "encoding": {"y": loss | {"field": "raw"}},
      },
      {
        "mark": {"type": "line", "strokeWidth": 2.2, "clip": True},
        "params": [ZOOM],
        "encoding": {"y": loss, "strokeDash": dashes, "detail": {"field": "member"}},
      },
      {
        "mark": {"type": "point", "filled": True, "size": 70, "clip": True},
        "params": [NEAREST],
        "encoding": {
          "y": loss, "tooltip": lines,
          "opacity": {"condition": {"param": "hover", "empty": False, "value": 1}, "value": 0},
        },
      },
    ],
  }  # fmt: skip
