"""Training loss against training time and against tokens, a panel for each pair."""

from collections.abc import Mapping, Sequence
from urllib.parse import quote

import numpy as np
from matplotlib.axes import Axes

from moejax.comparison import curves, quantities
from moejax.comparison.palette import member_colors
from moejax.comparison.plots.drawing import Plot, log_axis, new_figure, render, style
from moejax.comparison.record import Comparison, Member, dense_names, known, pair_members

SHOWN = 0.02
"""Part of a run, from its start, that is left out: the fall from chance would flatten everything after it."""


def loss_curves(comparison: Comparison, metrics: Mapping[str, curves.Metrics]) -> list[Plot]:
  """Two plots for each pair that has metrics."""
  colors = member_colors(comparison)
  plots = []
  for dense in dense_names(comparison):
    members = pair_members(comparison, dense)
    for axis, key in (("time", "step_time_s"), ("tokens", "tokens_per_step")):
      drawn = [m for m in members if known(m.number(key)) and len(curves.series(metrics.get(m.name, ()), "loss")[0])]
      if drawn:
        with style():
          plots.append(_plot(dense, drawn, metrics, colors, axis, key))
  return plots


def _plot(
  dense: str,
  members: Sequence[Member],
  metrics: Mapping[str, curves.Metrics],
  colors: Mapping[str, str],
  axis: str,
  key: str,
) -> Plot:
  figure = new_figure(3.6)
  axes = figure.add_subplot()
  lines = {}
  for member in members:
    steps, loss = curves.series(metrics[member.name], "loss")
    lines[member.name] = (steps * member.number(key), loss, curves.smooth(steps, loss))
  longest = max(x[-1] for x, _, _ in lines.values())
  unit = quantities.time_unit(longest) if axis == "time" else "tokens"
  for member in members:
    _line(axes, member, lines[member.name], colors[member.name], unit)
  _limits(axes, list(lines.values()), longest, unit)
  axes.set_xlabel(f"training time ({unit})" if axis == "time" else "training tokens")
  axes.set_ylabel("training loss (nats per token)")
  axes.legend(loc="upper right", handlelength=2.2, labelspacing=0.4)
  amount = quantities.duration if axis == "time" else lambda tokens: f"{quantities.count(tokens)} tokens"
  ends = "; ".join(f"{name} {smooth[-1]:.3f} after {amount(x[-1])}" for name, (x, _, smooth) in lines.items())
  what = "training time (steps x measured step time)" if axis == "time" else "tokens"
  return render(
    figure,
    f"loss_{axis}_{quote(dense, safe='')}",
    alt=f"Training loss against {axis} for the pair of {dense}. Smoothed at the end: {ends}.",
    caption=f"Pair of {dense}: loss against {what}, raw and smoothed, with the final smoothed loss. The first "
    f"{SHOWN:.0%} is not shown.",
  )


def _line(axes: Axes, member: Member, line: tuple[np.ndarray, ...], color: str, unit: str) -> None:
  x, raw, smooth = curves.thin(*line)
  x = x if unit == "tokens" else x / quantities.SECONDS[unit]
  dashes = "-" if member.matched else (0, (4, 1.6))
  label = f"{member.name}: {smooth[-1]:.3f}"
  axes.plot(x, raw, color=color, linewidth=0.7, alpha=0.28, zorder=1)
  axes.plot(x, smooth, color=color, linewidth=2.0, linestyle=dashes, label=label, zorder=3 if member.matched else 2)


def _limits(axes: Axes, lines: Sequence[tuple[np.ndarray, ...]], longest: float, unit: str) -> None:
  """Frames the smoothed lines from 2 % of the longest run on."""
  first = min(max(SHOWN * longest, x[0]) for x, _, _ in lines)
  seen = np.concatenate([smooth[x >= first] for x, _, smooth in lines])
  lowest = float(np.quantile(np.concatenate([raw[x >= first] for x, raw, _ in lines]), 0.01))
  room = 0.05 * (seen.max() - lowest) or 0.1
  axes.set_ylim(lowest - room, seen.max() + room)
  low, high = (
    (first, longest) if unit == "tokens" else (quantities.in_unit(first, unit), quantities.in_unit(longest, unit))
  )
  if high > low:
    axes.set_xscale("log")
    axes.set_xlim(low, high * (high / low) ** 0.02)
    log_axis(axes.xaxis, low, high)
