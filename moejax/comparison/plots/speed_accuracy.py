"""The speed-accuracy curve: step time against next-token accuracy, bits per byte, and the score of each benchmark."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from moejax.comparison.palette import member_colors
from moejax.comparison.plots import labels
from moejax.comparison.plots.drawing import INK, Plot, legend_above, log_axis, new_figure, render, spread, style
from moejax.comparison.quantities import duration, with_stderr
from moejax.comparison.record import Comparison, Member, equal_names, known, task_keys
from moejax.evaluation.tasks import ACCURACIES

MARKERS = {"dense": "o", "moe": "D"}
LINES: dict[str, Any] = {"dense": "-", "moe": (0, (5, 2))}
EQUAL: dict[str, Any] = {"linewidth": 15, "alpha": 0.22}
NEAREST: dict[str, Any] = {"linewidth": 2, "linestyle": ":"}
"""How a pair is joined: a band where step times are equal within the tolerance, dots where not."""
WIDE = 3.0
"""Ratio of the largest to the smallest step time above which the axis is logarithmic."""


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
  Measure("accuracy", "next-token accuracy (%)", "next-token accuracy on held-out text", scale=100.0, unit="%"),
  Measure(
    "bits_per_byte", "bits per byte (axis reversed: up is better)", "bits per byte of held-out text", reversed=True
  ),
)


def task_measures(comparison: Comparison) -> list[Measure]:
  """A measure for each benchmark of a member, and for their average."""
  return [_task_measure(key) for key in task_keys(comparison)]


def _task_measure(key: str) -> Measure:
  _, name, metric = key.split("/")
  words = metric.replace("_", " ")
  if metric.startswith(ACCURACIES):
    return Measure(key, f"{name}: {words} (%)", f"{words} of {name}", scale=100.0, unit="%")
  if "perplexity" in metric or metric == "bits_per_byte":
    return Measure(key, f"{name}: {words} (axis reversed: up is better)", f"{words} of {name}", reversed=True)
  return Measure(key, f"{name}: {words}", f"{words} of {name}")


def speed_accuracy(comparison: Comparison, measures: Sequence[Measure] = MEASURES) -> list[Plot]:
  """A plot for each measure that at least one member has."""
  plots = []
  for measure in measures:
    points = {m.name: point for m in comparison.members if (point := _point(m, measure))}
    if points:
      with style():
        plots.append(_plot(comparison, points, measure))
  return plots


def _point(member: Member, measure: Measure) -> tuple[float, float] | None:
  """Step time in seconds and scaled value; None where either is not known."""
  step_time_s, value = member.step_time_s, member.number(measure.key)
  return (step_time_s, value * measure.scale) if known(step_time_s) and known(value) else None


def _plot(comparison: Comparison, in_seconds: Mapping[str, tuple[float, float]], measure: Measure) -> Plot:
  figure = new_figure(4.4)
  axes = figure.add_subplot()
  members = [member for member in comparison.members if member.name in in_seconds]
  unit, per_unit = ("s", 1.0) if min(x for x, _ in in_seconds.values()) >= 1.0 else ("ms", 1e3)
  points = {name: (x * per_unit, y) for name, (x, y) in in_seconds.items()}
  errors = {m.name: (m.number(f"{measure.key}_stderr") or 0.0) * measure.scale for m in members}
  _limits(axes, points, errors, measure)
  axes.set_xlabel(f"step time ({unit})")
  axes.set_ylabel(measure.label)
  colors = member_colors(comparison)
  joined = [(p.dense, p.moe) for p in comparison.pairs if p.moe and {p.dense, p.moe} <= set(points)]
  bands = [np.array([points[dense], points[moe]]) for dense, moe in joined]
  equal = equal_names(comparison)
  for (_, moe), band in zip(joined, bands, strict=True):
    axes.plot(*band.T, color=colors[moe], zorder=1, **(EQUAL if moe in equal else NEAREST))
  curves = [_curve(axes, points, members, kind) for kind in MARKERS]
  for member in members:
    _marker(axes, points[member.name], errors[member.name], member, colors[member.name])
  legend_above(figure, _legend(members, {moe in equal for _, moe in joined}), columns=2)
  error_lines = [np.array([(x, y - errors[name]), (x, y + errors[name])]) for name, (x, y) in points.items()]
  labels.place(axes, list(points.values()), list(points), [*(c for c in curves if len(c)), *bands, *error_lines])
  listed = "; ".join(
    f"{m.name} {duration(m.step_time_s)}, "
    f"{with_stderr(m.number(measure.key), m.number(f'{measure.key}_stderr'), scale=measure.scale, unit=measure.unit)}"
    for m in members
  )
  return render(
    figure,
    f"speed_{measure.key.replace('/', '_')}",
    alt=f"Step time against {measure.caption}. {listed}.",
    caption=f"Step time against {measure.caption}. Up and left is better. Error bars are one standard error.",
  )


def _limits(axes: Axes, points: Mapping[str, tuple], errors: Mapping[str, float], measure: Measure) -> None:
  times = [x for x, _ in points.values()]
  low, high = spread(times, least=1.15)
  if max(times) / min(times) >= WIDE:
    room = (high / low) ** 0.14
    low, high = low / room, high * room
    axes.set_xscale("log")
    log_axis(axes.xaxis, low, high)
  else:
    low, high = low - 0.14 * (high - low), high + 0.14 * (high - low)
    axes.xaxis.set_major_locator(MaxNLocator(7))
  axes.set_xlim(low, high)
  bottom = min(y - errors[name] for name, (_, y) in points.items())
  top = max(y + errors[name] for name, (_, y) in points.items())
  room = 0.2 * (top - bottom) or 0.01 * abs(top) or 1.0
  axes.set_ylim((top + room, bottom - room) if measure.reversed else (bottom - room, top + room))


def _curve(axes: Axes, points: Mapping[str, tuple], members: Sequence[Member], kind: str) -> np.ndarray:
  """The line through the matched members of one kind, fastest first."""
  line = np.array(sorted(points[m.name] for m in members if m.kind == kind and m.matched)).reshape(-1, 2)
  axes.plot(*line.T, color=INK, linewidth=1.3, linestyle=LINES[kind], zorder=2)
  return line


def _marker(axes: Axes, point: tuple[float, float], error: float, member: Member, color: str) -> None:
  """An error bar, then the marker: full where matched, hollow where not."""
  axes.errorbar(*point, yerr=error, color=color, capsize=3, linewidth=1.4, zorder=3, fmt="none")
  face = color if member.matched else "white"
  style = MARKERS[member.kind]
  axes.plot(*point, style, color=color, markerfacecolor=face, markersize=8, markeredgewidth=2, zorder=4)


def _legend(members: Sequence[Member], bands: set[bool]) -> list:
  def entry(kind: str, text: str, matched: bool) -> Line2D:
    line: Any = LINES[kind] if matched else "none"
    face = INK if matched else "white"
    return Line2D([], [], color=INK, marker=MARKERS[kind], markerfacecolor=face, linestyle=line, label=text)

  entries: list = [entry("dense", "dense", True)] if any(m.kind == "dense" for m in members) else []
  if any(m.kind == "moe" and m.matched for m in members):
    entries.append(entry("moe", "MoE, closest in step time", True))
  if any(m.kind == "moe" and not m.matched for m in members):
    entries.append(entry("moe", "MoE, other candidate", False))
  if True in bands:
    entries.append(Patch(facecolor="#9aa3ad", alpha=0.4, label="a pair at equal step time"))
  if False in bands:
    entries.append(Line2D([], [], color="#9aa3ad", label="a pair, step times not equal", **NEAREST))
  return entries
