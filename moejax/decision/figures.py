"""The figures of a decision and of a fit, with the library and the colors of the report of a comparison."""

from typing import Any

import numpy as np

from moejax.comparison.palette import LAYERS, LIGHT
from moejax.comparison.plots.drawing import draw
from moejax.comparison.plots.figure import HEIGHT, WIDTH, Figure, Spec, axis, rounded, told
from moejax.decision.decide import Decision
from moejax.scaling.fitting import Fit


def decision_figures(decision: Decision) -> tuple[Figure, ...]:
  """The probability that the MoE is better, and the gap of the losses, for other budgets."""
  rows = []
  for row in decision.curve:
    low, middle, high = row["gap_nats"]
    rows.append(
      {"days": rounded(row["days"]), "dense": row["dense"], "moe": row["moe"],
       "probability": rounded(row["probability"], 4), "low": rounded(low, 4), "gap": rounded(middle, 4),
       "high": rounded(high, 4), "budget": rounded(decision.budget.days)}
    )  # fmt: skip
  first, last = rows[0], rows[-1]
  ends = f"of {first['days']:.3g} days: {{}}; of {last['days']:.3g} days: {{}}"
  return (
    Figure(
      name="decision_probability",
      title="Probability that the MoE is better",
      alt="Probability that the MoE is better, with a budget "
      + ends.format(f"{first['probability']:.2f}", f"{last['probability']:.2f}"),
      caption="For each budget, the best dense model and the best MoE of this budget. The dashed line is the budget.",
      spec=_curve(rows, "probability", "probability that the MoE is better", 0.5, domain=[0, 1]),
    ),
    Figure(
      name="decision_gap",
      title="Gap of the losses",
      alt="Median loss of the dense model minus that of the MoE in nats per token, with a budget "
      + ends.format(f"{first['gap']:+.3f}", f"{last['gap']:+.3f}"),
      caption="Loss of the best dense model minus that of the best MoE. The band is the 80 % interval. Above 0, the "
      "MoE is better.",
      spec=_curve(rows, "gap", "loss of the dense model minus MoE, nats", 0.0, band=("low", "high")),
    ),
  )


def _curve(
  rows: list[dict[str, Any]], field: str, title: str, even: float, band: tuple[str, str] | None = None, **scale: Any
) -> Spec:
  tooltip = [
    told("days", "days", ",.3~r"), told("probability", "probability of the MoE", ".2f"),
    told("gap", "gap, nats", "+.3f"), told("dense", "best dense"), told("moe", "best MoE"),
  ]  # fmt: skip
  y = axis(field, title, **scale)
  layers: list[Spec] = [
    {"mark": {"type": "rule", "color": "var(--axis)"}, "encoding": {"x": None, "y": {"datum": even}}},
    {
      "transform": [{"aggregate": [{"op": "max", "field": "budget", "as": "budget"}]}],
      "mark": {"type": "rule", "strokeDash": [5, 4], "color": "var(--muted)"},
      "encoding": {"x": {"field": "budget"}},
    },
    {"mark": {"type": "line", "color": "var(--accent)"}, "encoding": {"y": y}},
    {"mark": {"type": "point", "filled": True, "size": 60, "color": "var(--accent)", "opacity": 0.01},
     "encoding": {"y": y, "tooltip": tooltip}},
  ]  # fmt: skip
  if band:
    area = {"type": "area", "opacity": 0.2, "color": "var(--accent)"}
    low = axis(band[0], title, **scale)
    layers.insert(0, {"mark": area, "encoding": {"y": low, "y2": {"field": band[1]}}})
  return {
    "width": WIDTH, "height": HEIGHT, "data": {"values": rows},
    "encoding": {"x": axis("days", "days of training (dashed: the budget)", type="log")},
    "layer": layers,
  }  # fmt: skip


def fit_figure(fit: Fit) -> Figure:
  """Loss against training FLOPs with the fit of each model size, and the error of each run."""
  runs = [
    {"run": run.name, "kind": _kind(run.shape.expansion), "flops": rounded(run.flops), "loss": rounded(run.loss),
     "error": rounded(float(fit.predict(run.shape, run.tokens)) - run.loss, 4)}
    for run in fit.runs
  ]  # fmt: skip
  curves = []
  for number, shape in enumerate(dict.fromkeys(run.shape for run in fit.runs)):
    tokens = [run.tokens for run in fit.runs if run.shape == shape]
    grid = np.geomspace(min(tokens) / 2, max(tokens) * 4, 64)
    curves += [
      {"size": number, "kind": _kind(shape.expansion), "flops": rounded(at * shape.training_flops),
       "loss": rounded(float(fit.predict(shape, at)))}
      for at in grid
    ]  # fmt: skip
  kinds = list(dict.fromkeys(_kind(expansion) for expansion in sorted({run.shape.expansion for run in fit.runs})))
  color = {
    "field": "kind", "type": "nominal", "legend": {"title": None},
    "scale": {"domain": kinds, "range": [LAYERS[i % len(LAYERS)] for i in range(len(kinds))]},
  }  # fmt: skip
  x = axis("flops", "training FLOPs", type="log")
  point = {"type": "point", "filled": True, "size": 60, "opacity": 0.8}
  tooltip = [told("run", "run"), told("loss", "loss", ".4f"), told("error", "predicted minus measured", "+.4f")]
  loss, error = axis("loss", "loss, nats per token"), axis("error", "predicted minus measured, nats")
  left = [
    {"data": {"values": curves}, "mark": {"type": "line", "strokeWidth": 0.9},
     "encoding": {"y": loss, "detail": {"field": "size"}}},
    {"data": {"values": runs}, "mark": point, "encoding": {"y": loss, "tooltip": tooltip}},
  ]  # fmt: skip
  right = [
    {"data": {"values": [{}]}, "mark": {"type": "rule", "color": "var(--axis)"},
     "encoding": {"x": None, "color": None, "y": {"datum": 0}}},
    {"data": {"values": runs}, "mark": point, "encoding": {"y": error, "tooltip": tooltip}},
  ]  # fmt: skip
  frame = {"width": WIDTH - 120, "height": HEIGHT, "encoding": {"x": x, "color": color}}
  return Figure(
    name="fit",
    title=f"The law {fit.form.name}, fitted to {len(fit.runs)} runs",
    alt=f"Losses of {len(fit.runs)} runs against their training FLOPs, with the fit of each model size.",
    caption="Each line is a model size.",
    spec={"hconcat": [frame | {"layer": left}, frame | {"layer": right}]},
  )


def drawn(figure: Figure, format: str) -> bytes:
  """The figure as an SVG or a PNG, on a light page."""
  svg, png = draw(figure.spec, figure.title, figure.statement, LIGHT)
  return png if format == "png" else svg.encode()


def _kind(expansion: float) -> str:
  return "dense" if expansion <= 1 else f"expansion {expansion:.3g}"
