"""Formats fits for the terminal, and plots them with the runs that they were fitted to."""

import io

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moejax.scaling.ensemble import Fitted
from moejax.scaling.fitting import Fit
from moejax.terminal import Fitting

COLORS = ("#0b3c6b", "#ee7a1c", "#00a37a", "#cc6aa5", "#8a8a8a")


def fit_page(fitted: Fitted) -> RenderableType:
  """Constants with intervals, errors, and weights of the ensemble."""
  parts: list[RenderableType] = [part for found in fitted.fits for part in _fit(found)]
  table = _table("weights in the ensemble", "law", "weight", "source")
  sources = {law.name: law.source for law in fitted.laws}
  for name, weight in sorted(fitted.weights.items(), key=lambda item: -item[1]):
    table.add_row(Text(name), f"{weight:.3f}", Text(sources[name]))
  return Group(*parts, Fitting(table))


def _fit(found: Fit) -> list[RenderableType]:
  table = _table(
    f"{found.form.name}: fitted to {len(found.runs)} runs", "constant", "value", "80 % interval", "published"
  )
  for name, value in found.constants.items():
    low, high = found.interval(name)
    table.add_row(name, f"{value:.4g}", f"{low:.4g} to {high:.4g}", f"{found.form.published[name]:.4g}")
  errors = (
    f"error of the runs: {found.error:.4f} nats; the {len(found.held_out)} largest, predicted from the others: "
    f"{found.held_out_error:.4f} nats"
  )
  return [Fitting(table), Text(errors)]


def _table(title: str, *heads: str) -> Table:
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
  for head in heads:
    table.add_column(head, justify="left" if head in ("law", "constant", "source") else "right")
  return table


def plot_fit(found: Fit, format: str = "png") -> bytes:
  """Loss against training FLOPs with the fit of each model size, and the error of each run."""
  figure = Figure(figsize=(11, 4.5), layout="constrained")
  left, right = figure.subplots(1, 2)
  expansions = sorted({run.shape.expansion for run in found.runs})
  for number, expansion in enumerate(expansions):
    color = COLORS[number % len(COLORS)]
    runs = [run for run in found.runs if run.shape.expansion == expansion]
    label = "dense" if expansion == 1 else f"expansion {expansion:.3g}"
    flops, losses = [run.flops for run in runs], np.array([run.loss for run in runs])
    left.scatter(flops, losses, color=color, label=label, zorder=3, alpha=0.8)
    for shape in {run.shape for run in runs}:
      tokens = [run.tokens for run in runs if run.shape == shape]
      grid = np.geomspace(min(tokens) / 2, max(tokens) * 4, 64)
      left.plot(grid * shape.training_flops, found.predict(shape, grid), color=color, linewidth=0.8)
    predicted = np.array([float(found.predict(run.shape, run.tokens)) for run in runs])
    right.scatter(flops, predicted - losses, color=color, zorder=3, alpha=0.8)
  left.set(xscale="log", xlabel="training FLOPs", ylabel="loss, nats per token", title=f"law {found.form.name}")
  right.axhline(0, color="#8a8a8a", linewidth=0.8)
  right.set(xscale="log", xlabel="training FLOPs", ylabel="predicted minus measured, nats", title="errors")
  left.legend(frameon=False)
  for axes in (left, right):
    axes.grid(alpha=0.25)
  buffer = io.BytesIO()
  figure.savefig(buffer, format=format, dpi=144, metadata={"Date": None} if format == "svg" else None)
  return buffer.getvalue()
