"""Common style of all figures, and their conversion to PNG and inline SVG."""

import dataclasses
import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

INK, FAINT = "#22262b", "#d9dde2"
WIDTH = 5.2
"""Width of figures in inches: two fit side by side on a wide page, and one is readable on a phone."""

STYLE: dict[Any, Any] = {
  "axes.axisbelow": True,
  "axes.edgecolor": "#8b939c",
  "axes.formatter.useoffset": False,
  "axes.grid": True,
  "axes.labelcolor": INK,
  "axes.labelsize": 10.5,
  "axes.linewidth": 0.8,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlesize": 10.5,
  "figure.facecolor": "white",
  "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
  "font.size": 10.0,
  "grid.color": "#e7eaee",
  "grid.linewidth": 0.8,
  "legend.fontsize": 9.5,
  "legend.frameon": False,
  "lines.solid_capstyle": "round",
  # Text stays text, and equal figures give equal bytes.
  "svg.fonttype": "none",
  "svg.hashsalt": "moejax",
  "text.color": INK,
  "text.parse_math": False,
  "xtick.color": "#59616b",
  "xtick.labelcolor": INK,
  "ytick.color": "#59616b",
  "ytick.labelcolor": INK,
}


@dataclasses.dataclass(frozen=True)
class Plot:
  """A figure of the report."""

  name: str
  """File name without its ending; also sets its SVG's ids apart from those of other plots on the page."""
  alt: str
  """What it shows, in words and numbers."""
  caption: str
  png: bytes = dataclasses.field(repr=False)
  svg: str = dataclasses.field(repr=False)


def new_figure(height: float) -> Figure:
  """An empty figure on an Agg canvas; call within `style()`."""
  figure = Figure(figsize=(WIDTH, height), layout="constrained")
  FigureCanvasAgg(figure)
  return figure


def style() -> AbstractContextManager[None]:
  """The matplotlib context for making and rendering figures."""
  return matplotlib.rc_context(STYLE)


def render(figure: Figure, name: str, alt: str, caption: str) -> Plot:
  """The figure as a `Plot`; call within `style()`."""
  png, svg = io.BytesIO(), io.StringIO()
  figure.savefig(png, format="png", dpi=200)
  figure.savefig(svg, format="svg", dpi=200, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
  return Plot(name=name, alt=alt, caption=caption, png=png.getvalue(), svg=_inline(svg.getvalue(), name, alt))


def log_axis(axis: Axis, low: float, high: float) -> None:
  """Marks a logarithmic axis from `low` to `high` in plain round numbers."""
  axis.set_major_locator(FixedLocator(round_ticks(low, high)))
  axis.set_minor_locator(NullLocator())
  axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def round_ticks(low: float, high: float) -> list[float]:
  """Three to seven round numbers within low..high, evenly spread on a log axis."""
  decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
  for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
    ticks = [float(tick) for decade in decades for tick in decade * np.array(digits) if low <= tick <= high]
    if len(ticks) >= 4:
      return ticks[:: 1 + (len(ticks) - 1) // 7]
  return ticks or [low, high]


def plain(value: float) -> str:
  """A tick's number without exponent: 0.02, 15, 1,200, 30k, 4M."""
  if abs(value) >= 1e4:
    for power, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
      if abs(value) >= power:
        return f"{value / power:.4g}{suffix}"
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def spread(values: Sequence[float], least: float) -> tuple[float, float]:
  """Limits around `values`, not nearer than the factor `least` on either side of their center."""
  low, high = min(values), max(values)
  center = (low * high) ** 0.5
  return min(low, center / least), max(high, center * least)


def legend_above(figure: Figure, handles: Sequence, columns: int) -> None:
  figure.legend(handles=list(handles), loc="outside upper center", ncols=columns, handlelength=3.2)


def _inline(svg: str, name: str, alt: str) -> str:
  """The SVG as an element of an HTML page: without prolog, sized by the page, ids of its own, nothing to fetch."""
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
  head, body = svg.split(">", 1)
  view_box = re.search(r'viewBox="([^"]*)"', head)
  assert view_box
  prefix = "p" + name.encode().hex()
  body = re.sub(r'(?<= )id="([^"]+)"', rf'id="{prefix}-\1"', body)
  body = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", body)
  label = alt.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
  return f'<svg viewBox="{view_box[1]}" role="img" aria-label="{label}">{body}'
