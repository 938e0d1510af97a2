"""What `moejax sparsity` measures: quality and speed against active parameters, and experts per token by layer.

L stacked layers
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.comparison.plots import labels
from moejax.comparison.plots.figure import HEIGHT, WIDTH, Figure, Spec, axis, rounded
from moejax.config.router import ThresholdRouter

KINDS = {"all": "#6b7280", "threshold": "#1f77b4", "top_k": "#d1660f", "threshold_top_k": "#008f6b"}
"""Color of each kind of mode."""
SMALL = 150
"""Height in pixels of the panels below the first."""


def sparsity_plots(found: Mapping[str, Any]) -> list[Figure]:
  """The trade-off and, if a mode has a threshold, the use of experts by layer.

  Args:
    found: content of sparsity.json.
  """
  by_layer = _layers(found)
  return [_trade_off(found), *([by_layer] if by_layer else [])]


def _trade_off(found: Mapping[str, Any]) -> Figure:
  """One panel for perplexity, one for speed, and one for each benchmark, over the same axis of active parameters."""
  rows, first = found["modes"], found["modes"][0]
  panels = [_perplexity(found)]
  if "tokens_per_s" in first:
    panels.append(_speed(rows))
  panels += [_score(rows, name) for name in first.get("tasks", {}) if not name.endswith("_stderr")]
  listed = "; ".join(
    f"{row['mode']} {row['active_fraction']:.0%} active, perplexity {row['perplexity_increase']:+.1%}" for row in rows
  )
  return Figure(
    name="sparsity",
    title="Quality and speed with fewer experts",
    alt=f"Perplexity increase against active parameters. {listed}. Chosen: {found['chosen']}.",
    caption="Increase in perplexity, speed and benchmark scores against active parameters.",
    spec={"vconcat": panels, "resolve": {"scale": {"x": "shared", "color": "independent"}}},
  )


def _active() -> Spec:
  return axis("active", "active parameters (% of all)", padding=40)


def _perplexity(found: Mapping[str, Any]) -> Spec:
  rows, limit = found["modes"], 100.0 * found["max_increase"]
  active = [100.0 * row["active_fraction"] for row in rows]
  increases = [100.0 * row["perplexity_increase"] for row in rows]
  across, down = labels.pixels(active, WIDTH), labels.pixels([-y for y in increases], HEIGHT)
  places = labels.place({row["mode"]: point for row, point in zip(rows, zip(across, down, strict=True), strict=True)})
  values = [
    {
      "mode": row["mode"], "kind": row["mode"].partition(":")[0], "active": rounded(x), "increase": rounded(y),
      "chosen": row["mode"] == found["chosen"],
    }
    | places[row["mode"]]
    for row, x, y in zip(rows, active, increases, strict=True)
  ]  # fmt: skip
  used = [kind for kind in KINDS if any(value["kind"] == kind for value in values)]
  color = {"field": "kind", "type": "nominal", "scale": {"domain": used, "range": [KINDS[kind] for kind in used]}}
  y = axis("increase", "increase in perplexity (%)", padding=26)
  return {
    "width": WIDTH, "height": HEIGHT, "data": {"values": values},
    "encoding": {"x": _active(), "y": y, "color": color | {"legend": {"title": None}}},
    "layer": [
      {"mark": {"type": "rule", "strokeDash": [4, 4], "color": "var(--muted)"},
       "data": {"values": [{"increase": rounded(limit)}]},
       "encoding": {"x": None, "color": {"value": "var(--muted)"}}},
      {"mark": {"type": "line", "strokeWidth": 1.6}},
      {"mark": {"type": "point", "filled": True, "size": 70, "opacity": 1}},
      {"mark": {"type": "point", "size": 320, "strokeWidth": 1.6}, "transform": [{"filter": "datum.chosen"}],
       "encoding": {"color": {"value": "var(--ink)"}}},
      {"mark": {"type": "text", "baseline": "middle", "dx": {"expr": "datum.dx"}, "dy": {"expr": "datum.dy"},
                "align": {"expr": "datum.align"}},
       "encoding": {"text": {"field": "mode"}, "color": {"value": "var(--ink)"}}},
    ],
  }  # fmt: skip


def _speed(rows: list[Mapping[str, Any]]) -> Spec:
  """Speed-up over all experts, since tokens per second of different batch sizes differ by an order of magnitude."""
  base = rows[0]["tokens_per_s"]
  values = [
    {"active": rounded(100.0 * row["active_fraction"]), "relative": rounded(row["tokens_per_s"][size] / base[size]),
     "batch": f"batch {size}: all experts {base[size]:,.0f} tokens/s"}
    for row in rows
    for size in base
  ]  # fmt: skip
  color = {
    "field": "batch",
    "type": "nominal",
    "sort": None,
    "scale": {"range": [*KINDS.values()][1:]},
    "legend": {"title": None},
  }
  return {
    "width": WIDTH, "height": SMALL, "data": {"values": values},
    "mark": {"type": "line", "point": True, "strokeWidth": 1.6},
    "encoding": {"x": _active(), "y": axis("relative", "relative tokens/s"), "color": color},
  }  # fmt: skip


def _score(rows: list[Mapping[str, Any]], name: str) -> Spec:
  values = []
  for row in rows:
    score, error = row["tasks"][name], row["tasks"].get(f"{name}_stderr", 0.0)
    ends = {"low": rounded(score - error), "high": rounded(score + error)}
    values.append({"active": rounded(100.0 * row["active_fraction"]), "score": rounded(score)} | ends)
  return {
    "width": WIDTH, "height": SMALL, "data": {"values": values},
    "encoding": {"x": _active(), "y": axis("score", name, padding=20)},
    "layer": [
      {"mark": {"type": "rule", "color": "var(--ink)"}, "encoding": {"y": {"field": "low"}, "y2": {"field": "high"}}},
      {"mark": {"type": "line", "point": True, "strokeWidth": 1.6, "color": KINDS["threshold"]}},
    ],
  }  # fmt: skip


def _layers(found: Mapping[str, Any]) -> Figure | None:
  """Fraction of the experts above the threshold in each layer, as in Figure 5 of the paper: the mean over tokens, and
  its standard deviation as a bar. The threshold is the default or, if it was not measured, the first one."""
  modes = [row for row in found["modes"] if row["mode"].startswith("threshold:")]
  if not modes:
    return None
  row = next((row for row in modes if row["mode"] == f"threshold:{ThresholdRouter().threshold:g}"), modes[0])
  series = {"feed-forward": ("experts_per_token", "num_experts")}
  if "attention_experts_above_threshold" in row:
    series["attention"] = ("attention_experts_above_threshold", "attention_experts")
  values, words = [], []
  for shift, (kind, (key, of)) in enumerate(series.items()):
    percent_L, error_L = (100.0 * np.asarray(row[name]) / found[of] for name in (key, f"{key}_stdev"))
    for layer, (percent, error) in enumerate(zip(percent_L, error_L, strict=True)):
      ends = {"low": rounded(max(0.0, percent - error)), "high": rounded(min(100.0, percent + error))}
      values.append({"layer": layer + 0.1 * shift, "kind": kind, "percent": rounded(percent)} | ends)
    words.append(f"{kind}: " + ", ".join(f"{percent:.0f}%" for percent in percent_L))
  scale = {"domain": [*series], "range": [KINDS["top_k"], KINDS["threshold"]][: len(series)]}
  x = axis("layer", "sparse layer", padding=20)
  x["axis"] |= {"values": list(range(len(row["experts_per_token"]))), "format": "d"}
  return Figure(
    name="sparsity_layers",
    title="Use of experts by layer",
    alt=f"Experts above {row['mode']} by layer. {'; '.join(words)}.",
    caption=f"Experts of a token whose probability is above {row['mode']}, by layer. Bars are one standard deviation "
    "over tokens. Attention uses all its experts.",
    spec={
      "width": WIDTH, "height": HEIGHT, "data": {"values": values},
      "encoding": {
        "x": x, "y": axis("percent", "experts above the threshold (%)", domain=[0, 100]),
        "color": {"field": "kind", "type": "nominal", "scale": scale, "legend": {"title": None}},
      },
      "layer": [
        {"mark": {"type": "rule", "strokeWidth": 1.5},
         "encoding": {"y": {"field": "low"}, "y2": {"field": "high"}}},
        {"mark": {"type": "line", "point": {"filled": True, "size": 60}, "strokeWidth": 1.6}},
      ],
    },
  )  # fmt: skip
