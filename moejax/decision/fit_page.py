"""Formats fits for the terminal."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moejax.scaling.ensemble import Fitted
from moejax.scaling.fitting import Fit
from moejax.terminal import Fitting


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
