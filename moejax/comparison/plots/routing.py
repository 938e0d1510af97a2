"""Router metrics over training: a figure for each member, with a choice of the metric.

L stacked layers  Z = points of a curve
"""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from moejax.comparison import curves
from moejax.comparison.palette import LAYERS, layer_colors
from moejax.comparison.plots.figure import (
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
  patched,
  rounded,
  shown,
  told,
)
from moejax.comparison.record import Comparison

METRICS = (
  ("router/load_max_over_mean", "load of the busiest expert / mean load"),
  ("router/dropped_fraction", "fraction of choices dropped"),
  ("router/entropy", "entropy of router probabilities (nats)"),
)
"""Statistics by layer."""

Line = tuple[str, np.ndarray, np.ndarray]
"""Label, steps [Z] and values [Z]."""


def routing(comparison: Comparison, metrics: Mapping[str, curves.Metrics]) -> dict[str, Figure]:
  """A figure by name of each run (seed) that logged what its routers do."""
  figures = {}
  for run in (run for member in comparison.members for run in member.run_names):
    rows = metrics.get(run, ())
    measured = [(key.rpartition("/")[2], label, _by_layer(rows, key)) for key, label in METRICS]
    measured = [(key, label, lines) for key, label, lines in measured if lines]
    if measured:
      measured += [(f"loss_{name.replace(' ', '_')}", f"{name} loss", [line]) for name, line in _losses(rows)]
      figures[run] = _figure(run, measured)
  return figures


def _by_layer(rows: curves.Metrics, name: str) -> list[Line]:
  steps_Z, layers, values_ZL = curves.per_layer(rows, name)
  return [(f"layer {layer}", steps_Z, values_ZL[:, i]) for i, layer in enumerate(layers)]


def _losses(rows: curves.Metrics) -> list[tuple[str, Line]]:
  """Every `loss/NAME` of a router by name: all but the z-loss of the logits."""
  names = sorted({key for row in rows for key in row if key.startswith("loss/") and key != "loss/z"})
  return [(n.removeprefix("loss/").replace("_", " "), ("all layers", *curves.series(rows, n))) for n in names]


def _figure(name: str, measured: Sequence[tuple[str, str, list[Line]]]) -> Figure:
  layers = list(dict.fromkeys(of for _, _, lines in measured for of, _, _ in lines if of != "all layers"))
  entries = [Entry(layer, color) for layer, color in zip(layers, layer_colors(len(layers)), strict=True)]
  if any(of == "all layers" for _, _, lines in measured for of, _, _ in lines):
    entries.append(Entry("all layers", LAYERS[-1]))
  options = tuple(_option(name, key, label, lines) for key, label, lines in measured)
  return Figure(
    name=f"routing_{quote(name, safe='')}",
    title=f"Router metrics: {name}",
    alt=str(options[0].alt),
    caption="Moving averages over training, by layer. Losses are sums over all sparse layers.",
    spec=patched(_spec(entries), options[0].patch),
    choices=(Choice("Metric", options),),
    legend=tuple(entries),
  )


def _option(name: str, key: str, label: str, lines: list[Line]) -> Option:
  rows: list[dict[str, Any]] = []
  for of, steps_Z, values_Z in lines:
    thin = curves.thin(steps_Z, curves.smooth(steps_Z, values_Z), points=200)
    rows += [{"series": of, "step": rounded(s), "value": rounded(v, 5)} for s, v in zip(*thin, strict=True)]
  ends = ", ".join(f"{of} {curves.last_tenth(values_Z):.3g}" for of, _, values_Z in lines)
  is_loss = key.startswith("loss_")  # there may be many, so they are only on the page
  return Option(
    label,
    {"data": {"values": rows}, "encoding": {"y": axis("value", label)}},
    file=None if is_loss else f"routing_{quote(name, safe='')}_{quote(key, safe='')}",
    alt=f"Router of {name}: {label} over training. Mean over the last tenth: {ends}.",
  )


def _spec(entries: Sequence[Entry]) -> Spec:
  color = {
    "field": "series",
    "type": "nominal",
    "scale": palette(entries),
    "legend": {"title": None, "symbolType": "stroke"},
  }
  lines = [told("series", "series"), told("step", "step", ",.0f"), told("value", "value", ".4~g")]
  return {
    "width": WIDTH,
    "height": 240,
    "params": [HIDDEN],
    "transform": [shown("series")],
    "encoding": {"x": axis("step", "training step"), "color": color},
    "layer": [
      {"mark": {"type": "line", "strokeWidth": 1.8, "clip": True}, "params": [ZOOM]},
      {
        "mark": {"type": "point", "filled": True, "size": 60, "clip": True},
        "params": [NEAREST],
        "encoding": {
          "tooltip": lines, "opacity": {"condition": {"param": "hover", "empty": False, "value": 1}, "value": 0},
        },
      },
    ],
  }  # fmt: skip
