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


Line = dict[str, np.ndarray]
"""Columns of the curve of a run."""


def loss_curves(comparison: Comparison, metrics: Mapping[str, curves.Metrics]) -> list[Figure]:
  """A figure for each pair that has metrics and step times, with a curve for each run (seed).

  Args:
    comparison: the comparison.
    metrics: the records of metrics.jsonl by run.
  """
  figures = []
  for dense in dense_names(comparison):
    members = [m for m in pair_members(comparison, dense) if known(m.step_time_s) and known(m.tokens_per_step)]
    lines = {m.name: _lines(m, metrics) for m in members}
    drawn = [m for m in members if lines[m.name]]
    if drawn:
      figures.append(_figure(dense, drawn, lines, member_colors(comparison)))
  return figures


def _lines(member: Member, metrics: Mapping[str, curves.Metrics]) -> dict[str, Line]:
  """The curves of the runs of a member that have one, by run."""
  lines = {run: _line(member, metrics.get(run, ())) for run in member.run_names}
  return {run: line for run, line in lines.items() if len(line["step"])}


def _line(member: Member, metrics: curves.Metrics) -> Line:
  """What may be on the x axis, after that of a parent that counts, and the loss, raw and smoothed."""
  steps, loss = curves.series(metrics, "loss")
  tokens = steps * (member.tokens_per_step or 0)
  before_s = member.counted("time_s")
  line = {
    "step": steps,
    "time_s": before_s + steps * (member.step_time_s or 0),
    "tokens": member.counted("tokens") + tokens,
  }
  if known(member.model_flops_per_token):
    line["flops"] = member.counted("flops") + tokens * member.model_flops_per_token
  elapsed_s = _elapsed(metrics, steps)
  if elapsed_s is not None:
    line["elapsed_s"] = before_s + elapsed_s
  return line | {"raw": loss, "loss": curves.smooth(steps, loss)}


def _elapsed(metrics: curves.Metrics, steps: np.ndarray) -> np.ndarray | None:
  """Seconds of training up to each step, from the speed that was logged, or None if it was not logged."""
  timed, step_times_s = curves.series(metrics, "step_time_s")
  if len(timed) != len(steps) or not len(steps):
    return None
  return np.cumsum(np.diff(timed, prepend=0.0) * step_times_s)


def _figure(
  dense: str, members: Sequence[Member], lines: Mapping[str, Mapping[str, Line]], colors: Mapping[str, str]
) -> Figure:
  every = [line for member in members for line in lines[member.name].values()]
  longest_s = max(line["time_s"][-1] for line in every)
  unit = quantities.time_unit(longest_s)
  final = {m.name: float(np.mean([line["loss"][-1] for line in lines[m.name].values()])) for m in members}
  entries = [Entry(m.name, colors[m.name], f"{final[m.name]:.3f}", not m.matched) for m in members]
  rows = [
    row
    for member in members
    for run, line in lines[member.name].items()
    for row in _rows(member, run, line, unit, SHOWN * longest_s)
  ]

  def option(field: str, title: str, file: str | None = None) -> Option:
    patch = {"encoding": {"x": {"field": field, "axis": {"title": title}}}}
    return Option(title.partition(" (")[0], patch, file and f"loss_{file}_{quote(dense, safe='')}", alt(field))

  def alt(field: str) -> str:
    ends = "; ".join(f"{m.name} {final[m.name]:.3f} after {_amount(lines[m.name], field)}" for m in members)
    return f"Training loss of the pair of {dense}. Smoothed at the end: {ends}."

  across = [option("time_s", f"training time ({unit}), steps x measured step time", "time")]
  across.append(option("tokens", "training tokens", "tokens"))
  if all("flops" in line for line in every):
    across.append(option("flops", "training FLOPs (model FLOPs)", "flops"))
  if all("elapsed_s" in line for line in every):
    across.append(option("elapsed_s", f"elapsed time of training ({unit}), as logged during the run"))
  across.append(option("step", "training step"))
  return Figure(
    name=f"loss_{quote(dense, safe='')}",
    title=f"Training loss: pair of {dense}",
    alt=str(across[0].alt),
    caption="Faint lines are the logged loss and bold lines its moving average, one for each seed. The legend has the "
    "mean over seeds. Dashed lines are candidates that are not the match. "
    f"The first {SHOWN:.0%} of training is not shown.",
    spec=_spec(entries, rows, str(across[0].patch["encoding"]["x"]["axis"]["title"])),
    choices=(Choice("Against", tuple(across)), scales("log", "linear")),
    legend=tuple(entries),
  )


def _amount(lines: Mapping[str, Line], field: str) -> str:
  """How far the runs of a member got on average."""
  end = float(np.mean([line[field][-1] for line in lines.values()]))
  if field.endswith("_s"):
    return quantities.duration(end)
  return f"{quantities.count(end)} {'FLOPs' if field == 'flops' else f'{field}s'.replace('ss', 's')}"


def _rows(member: Member, run: str, line: Line, unit: str, first_s: float) -> list[dict[str, Any]]:
  columns = dict(zip(line, curves.thin(*line.values(), points=POINTS), strict=True))
  for name in ("time_s", "elapsed_s"):
    if name in columns:
      columns[name] = columns[name] / quantities.SECONDS[unit]
  late = columns["time_s"] >= min(quantities.in_unit(first_s, unit), columns["time_s"][-1])
  rows = [dict(zip(columns, values, strict=True)) for values in zip(*(c[late] for c in columns.values()), strict=True)]
  series = {"member": member.name, "run": run, "matched": member.matched}
  return [series | {name: rounded(value, 5) for name, value in row.items()} for row in rows]


def _spec(entries: Sequence[Entry], rows: list[dict[str, Any]], title: str) -> Spec:
  color = {
    "field": "member",
    "type": "nominal",
    "scale": palette(entries),
    "legend": {"title": None, "symbolType": "stroke", "symbolOpacity": 1},
  }
  dashes = {"condition": {"test": "datum.matched", "value": [1, 0]}, "value": [6, 3]}
  loss = axis("loss", "training loss (nats per token)")
  lines = [
    told("run", "run"), told("loss", "loss, smoothed", ".4f"), told("raw", "loss", ".4f"),
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
        "encoding": {"y": loss | {"field": "raw"}, "detail": {"field": "run"}},
      },
      {
        "mark": {"type": "line", "strokeWidth": 2.2, "clip": True},
        "params": [ZOOM],
        "encoding": {"y": loss, "strokeDash": dashes, "detail": {"field": "run"}},
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
