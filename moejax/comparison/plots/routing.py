"""Router metrics over training: entropy and dropped choices by layer, and auxiliary losses by name.

L stacked layers  Z = points of a curve
"""

from collections.abc import Mapping, Sequence
from urllib.parse import quote

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moejax.comparison import curves
from moejax.comparison.plots.drawing import Plot, new_figure, render, style
from moejax.comparison.record import Comparison

LAYERS = "viridis"
PANELS = (("router/entropy", "entropy (nats)"), ("router/dropped_fraction", "dropped part of choices"))
"""Statistics by layer, one panel each."""

Line = tuple[str, np.ndarray, np.ndarray]
"""Label, steps [Z] and values [Z]."""


def routing(comparison: Comparison, metrics: Mapping[str, curves.Metrics]) -> dict[str, Plot]:
  """A plot by name of each member that logged what its routers do."""
  plots = {}
  for member in comparison.members:
    rows = metrics.get(member.name, ())
    panels = [(label, _by_layer(rows, name)) for name, label in PANELS]
    panels.append(("auxiliary loss", _auxiliary_losses(rows)))
    panels = [(label, lines) for label, lines in panels if lines]
    if len(panels) > 1:
      with style():
        plots[member.name] = _plot(member.name, panels)
  return plots


def _by_layer(rows: curves.Metrics, name: str) -> list[Line]:
  steps_Z, layers, values_ZL = curves.per_layer(rows, name)
  return [(f"layer {layer}", steps_Z, values_ZL[:, i]) for i, layer in enumerate(layers)]


def _auxiliary_losses(rows: curves.Metrics) -> list[Line]:
  """Every `loss/NAME` that a router makes: all but the z-loss of the logits, which is of another size."""
  names = sorted({key for row in rows for key in row if key.startswith("loss/") and key != "loss/z"})
  return [(name.removeprefix("loss/").replace("_", " "), *curves.series(rows, name)) for name in names]


def _plot(name: str, panels: Sequence[tuple[str, list[Line]]]) -> Plot:
  figure = new_figure(0.6 + 1.75 * len(panels))
  figure.suptitle(name, fontsize=11.5)
  axes_of = figure.subplots(len(panels), 1, sharex=True)
  for axes, (label, lines) in zip(axes_of, panels, strict=True):
    _draw(axes, label, lines)
  axes_of[-1].set_xlabel("training step")
  ends = "; ".join(
    f"{label}: " + ", ".join(f"{of} {curves.last_tenth(values_Z):.3g}" for of, _, values_Z in lines)
    for label, lines in panels
  )
  return render(
    figure,
    f"routing_{quote(name, safe='')}",
    alt=f"Router metrics of {name} over training. Mean over the last tenth: {ends}.",
    caption=f"{name}: entropy of router probabilities and fraction of dropped choices by layer, and auxiliary losses, "
    "smoothed.",
  )


def _draw(axes: Axes, label: str, lines: list[Line]) -> None:
  colors = matplotlib.colormaps[LAYERS](np.linspace(0.05, 0.85, len(lines)))
  for (of, steps_Z, values_Z), color in zip(lines, colors, strict=True):
    shown = curves.thin(steps_Z, curves.smooth(steps_Z, values_Z))
    axes.plot(*shown, color=color, linewidth=1.6, label=of)
  axes.set_title(label, loc="left", pad=3)
  axes.yaxis.set_major_locator(MaxNLocator(4))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
  if len(lines) <= 6:
    axes.legend(loc="best", handlelength=1.6, labelspacing=0.3, ncols=1 + (len(lines) > 3))
