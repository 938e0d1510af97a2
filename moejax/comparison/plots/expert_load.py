"""How evenly routers use their experts, over training: a heat map for each MoE member. Shapes as in `curves`.

L stacked layers  E experts  Z = points of a curve  Y = columns of a heat map
"""

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import numpy as np

from moejax.comparison import curves
from moejax.comparison.plots.figure import NUMBER, WIDTH, Figure, Spec, rounded, told
from moejax.comparison.record import Comparison

CELLS = 3000
"""About the number of cells of a heat map. More of them would make the page slow."""


def expert_load(comparison: Comparison, metrics: Mapping[str, curves.Metrics]) -> dict[str, Figure]:
  """A figure by name of each run (seed) of an MoE that logged its load. All share one color scale."""
  runs = [run for member in comparison.members for run in member.run_names]
  loads = {run: curves.relative_load(metrics.get(run, ())) for run in runs}
  loads = {name: (steps_Z, load_ZLE) for name, (steps_Z, load_ZLE) in loads.items() if load_ZLE.size}
  if not loads:
    return {}
  # A cell in a thousand may be off the scale. A wider scale would pale all others.
  largest = max(float(np.quantile(load_ZLE, 0.999)) for _, load_ZLE in loads.values())
  top = min(4.0, max(2.0, math.ceil(largest * 2) / 2))
  return {name: _figure(name, *load, metrics[name], top) for name, load in loads.items()}


def _figure(name: str, steps_Z: np.ndarray, load_ZLE: np.ndarray, metrics: curves.Metrics, top: float) -> Figure:
  layers, experts = load_ZLE.shape[1:]
  names = curves.layer_names(metrics, layers)
  edges, shown_YLE = curves.columns(steps_Z, load_ZLE, most=min(120, max(12, CELLS // (layers * experts))))
  rows = [
    {"layer": names[layer], "expert": expert, "start": rounded(edges[y]), "end": rounded(edges[y + 1]),
     "load": rounded(shown_YLE[y, layer, expert], 4)}
    for layer in range(layers) for y in range(len(shown_YLE)) for expert in range(experts)
  ]  # fmt: skip
  ends = curves.last_tenth(load_ZLE.max(axis=-1))
  listed = "; ".join(f"{layer} {end:.2f}" for layer, end in zip(names, ends, strict=True))
  return Figure(
    f"expert_load_{quote(name, safe='')}",
    title=f"Load of each expert: {name}",
    alt=f"Load of the {experts} experts of {name} over training. Largest / mean load in the last tenth: {listed}.",
    caption="Load relative to a balanced layer. Purple experts receive more choices than their share, orange fewer.",
    spec=_spec(rows, names, experts, top),
  )


def _spec(rows: list[dict[str, Any]], layers: list[str], experts: int, top: float) -> Spec:
  across = 1 if len(layers) <= 3 else 2
  every = 1 + (experts - 1) // 8
  scheme = {"scheme": "purpleorange", "reverse": True, "domain": [0, 1, top], "clamp": True}
  return {
    "data": {"values": rows},
    "columns": across,
    "facet": {"field": "layer", "type": "nominal", "sort": layers, "header": {"title": None}},
    "spacing": 16,
    "spec": {
      "width": WIDTH if across == 1 else WIDTH // 2 - 30,
      "height": max(60, min(220, 14 * experts)),
      "mark": {"type": "rect"},
      "encoding": {
        "x": {
          "field": "start", "type": "quantitative", "scale": {"nice": False, "zero": False},
          "axis": {"title": "training step", "labelExpr": NUMBER, "grid": False},
        },
        "x2": {"field": "end"},
        "y": {
          "field": "expert", "type": "ordinal", "axis": {"values": [*range(0, experts, every)], "title": "expert"},
        },
        "color": {
          "field": "load", "type": "quantitative", "scale": scheme,
          "legend": {"title": "load (1 = balanced)", "gradientLength": 160, "format": ".2~f"},
        },
        "tooltip": [
          told("layer", "layer"), told("expert", "expert"), told("load", "load", ".2f"),
          told("start", "from step", ",.0f"), told("end", "to step", ",.0f"),
        ],
      },
    },
  }  # fmt: skip
