"""How evenly routers use their experts, over training: heat maps for each MoE member. Shapes as in `curves`.

L stacked layers  E experts  Z = points of a curve  Y = columns of a heat map
"""

import math
from collections.abc import Mapping, Sequence
from urllib.parse import quote

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moejax.comparison import curves
from moejax.comparison.plots.drawing import Plot, new_figure, plain, render, style
from moejax.comparison.record import Comparison

DIVERGING, SEQUENTIAL = "PuOr_r", "Oranges"


def expert_load(comparison: Comparison, metrics: Mapping[str, curves.Metrics]) -> dict[str, Plot]:
  """A plot by name of each MoE member that logged its load; all share one color scale."""
  loads = {m.name: curves.relative_load(metrics.get(m.name, ())) for m in comparison.members}
  loads = {name: (steps_Z, load_ZLE) for name, (steps_Z, load_ZLE) in loads.items() if load_ZLE.size}
  if not loads:
    return {}
  # A cell in a thousand may be off the scale; a wider one would pale all others.
  largest = max(float(np.quantile(load_ZLE, 0.999)) for _, load_ZLE in loads.values())
  norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=min(4.0, max(2.0, math.ceil(largest * 2) / 2)))
  with style():
    return {name: _plot(name, *load, metrics[name], norm) for name, load in loads.items()}


def _plot(name: str, steps_Z: np.ndarray, load_ZLE: np.ndarray, metrics: curves.Metrics, norm: TwoSlopeNorm) -> Plot:
  layers, experts = load_ZLE.shape[1:]
  across = 1 if layers <= 4 else 2 if layers <= 10 else 3
  down = math.ceil(layers / across)
  below = 0.85 + 0.16 * max(2, layers)
  panel = (1.25 if experts <= 8 else 1.55) if across == 1 else 1.3
  figure = new_figure(0.8 + panel * down + below)
  figure.suptitle(name, fontsize=11.5)
  grid = figure.add_gridspec(down + 1, across, height_ratios=[panel] * down + [below - 0.3])
  names = curves.layer_names(metrics, layers)
  panels = [figure.add_subplot(grid[i // across, i % across]) for i in range(layers)]
  edges, shown_YLE = curves.columns(steps_Z, load_ZLE)
  for i, axes in enumerate(panels):
    mesh = _heat(axes, edges, shown_YLE[:, i].T, DIVERGING, norm)
    axes.set_title(names[i], loc="left", pad=3)
    axes.yaxis.set_major_locator(MaxNLocator(5 if across == 1 else 4, integer=True))
    axes.tick_params(labelleft=i % across == 0, labelbottom=False)
    if i % across == 0:
      axes.set_ylabel("expert")
  _scale(figure, mesh, panels, "load (1 = balanced)", extend="max" if load_ZLE.max() > norm.vmax else "neither")
  uneven_ZL = load_ZLE.max(axis=-1)
  _unevenness(figure, figure.add_subplot(grid[down, :]), steps_Z, uneven_ZL, names)
  ends = curves.last_tenth(uneven_ZL)
  listed = "; ".join(f"{layer} {end:.2f}" for layer, end in zip(names, ends, strict=True))
  return render(
    figure,
    f"expert_load_{quote(name, safe='')}",
    alt=f"Load of the {experts} experts of {name} over training. Largest / mean load in the last tenth: {listed}.",
    caption=f"{name}: load of each expert relative to the balanced load and, below, load of the busiest expert.",
  )


def _heat(axes: Axes, edges: np.ndarray, values: np.ndarray, colors: str, norm: Normalize) -> QuadMesh:
  """Rows of `values` over time; one picture inside the SVG, since a path for every cell would be megabytes."""
  rows = np.arange(values.shape[0] + 1) - 0.5
  mesh = axes.pcolormesh(edges, rows, values, cmap=colors, norm=norm, rasterized=True)
  axes.grid(False)
  axes.spines[:].set_visible(False)
  axes.xaxis.set_major_locator(MaxNLocator(5))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
  return mesh


def _unevenness(figure: Figure, axes: Axes, steps_Z: np.ndarray, uneven_ZL: np.ndarray, names: Sequence[str]) -> None:
  edges, shown_YL = curves.columns(steps_Z, uneven_ZL)
  high = max(1.5, float(np.quantile(uneven_ZL, 0.99)))
  mesh = _heat(axes, edges, shown_YL.T, SEQUENTIAL, Normalize(1.0, high))
  axes.invert_yaxis()
  every = 1 + (len(names) - 1) // 12
  axes.set_yticks(range(0, len(names), every), names[::every])
  axes.set_title("largest / mean load", loc="left", pad=3)
  axes.set_xlabel("training step")
  _scale(figure, mesh, [axes], "", extend="max" if uneven_ZL.max() > high else "neither")


def _scale(figure: Figure, mesh: QuadMesh, axes: Sequence[Axes], label: str, extend: str) -> None:
  bar = figure.colorbar(
    mesh, ax=list(axes), label=label, extend=extend, aspect=25 if label else 8, pad=0.02, extendfrac=0.03
  )
  bar.outline.set_visible(False)
  bar.ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
  bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(round(value, 3))))
