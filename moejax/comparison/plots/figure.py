"""A figure of the report: a Vega-Lite specification, with the choices that a reader has.

The colors of a specification are variables such as var(--ink), which the page defines for its light and dark theme.
The text of a user, such as the name of a member, is only a value of the data, never part of an expression or the name
of a field.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
WIDTH, HEIGHT = 560, 320
"""Size of a plot in pixels. On the page, its width is that of its frame."""

NUMBER = (
  "datum.value == 0 ? '0' : abs(datum.value) >= 1e15 ? replace(format(datum.value, '.3~e'), '+', '') "
  ": abs(datum.value) >= 1e4 ? replace(format(datum.value, '.4~s'), 'G', 'B') : format(datum.value, ',.4~r')"
)
"""The label of a tick: 0.02, 15, 1,200, 30k, 4M, 2B, 1e18."""


@dataclasses.dataclass(frozen=True)
class Option:
  """One value of a choice: the change that it makes to the specification."""

  label: str
  patch: Spec
  file: str | None = None
  """Name, without ending, of the files with this drawing, or None if it is only on the page."""
  alt: str | None = None
  """What the figure shows with this option, if it is not what the figure says."""


@dataclasses.dataclass(frozen=True)
class Choice:
  """A choice of the reader, such as the quantity on the x axis. Its first option is the default."""

  label: str
  options: tuple[Option, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
  """A line of the legend, which shows or hides a series."""

  series: str
  color: str
  words: str = ""
  hollow: bool = False


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure. The options of its first choice that have a file are drawn beside the page."""

  name: str
  """Name of its file, without its ending, unless its options have files. It is also its identity on the page."""
  title: str
  alt: str
  """What it shows, in words and numbers."""
  caption: str
  spec: Spec = dataclasses.field(repr=False)
  choices: tuple[Choice, ...] = ()
  legend: tuple[Entry, ...] = ()
  statement: str = ""
  """What its files say below the title, since they are shown without the page."""

  def drawings(self) -> dict[str, Spec]:
    """Specification of each drawing by the name of its file."""
    options = [option for choice in self.choices[:1] for option in choice.options if option.file]
    if not options:
      return {self.name: _still(self.spec)}
    return {option.file: _still(patched(self.spec, option.patch)) for option in options if option.file}


def _still(spec: Spec) -> Spec:
  """The specification without the marks that only the pointer shows."""
  if "layer" not in spec:
    return spec
  return spec | {"layer": [layer for layer in spec["layer"] if NEAREST not in layer.get("params", ())]}


def patched(spec: Any, patch: Any) -> Any:
  """A JSON merge patch (RFC 7386): objects are merged, null deletes, and other values replace."""
  if not isinstance(patch, Mapping):
    return patch
  merged = dict(spec) if isinstance(spec, Mapping) else {}
  for key, value in patch.items():
    if value is None:
      merged.pop(key, None)
    else:
      merged[key] = patched(merged.get(key), value)
  return merged


def scales(*names: str) -> Choice:
  """The choice between linear and logarithmic, `names` in their order, for the x axis."""
  zero = {"linear": False, "log": None}
  return Choice(
    "Scale", tuple(Option(name, {"encoding": {"x": {"scale": {"type": name, "zero": zero[name]}}}}) for name in names)
  )


def axis(field: str, title: str, **more: Any) -> Spec:
  """An encoding of a number by position. `more` are fields of its scale."""
  scale = ({} if more.get("type") == "log" else {"zero": False}) | {"nice": False} | more
  return {"field": field, "type": "quantitative", "scale": scale, "axis": {"title": title, "labelExpr": NUMBER}}


def told(field: str, title: str, number: str | None = None) -> Spec:
  """A line of the text that appears when the pointer is over a mark."""
  return {"field": field, "title": title} | ({"type": "quantitative", "format": number} if number else {})


def shown(field: str) -> Spec:
  """A transform that removes the series that the reader has hidden in the legend."""
  return {"filter": f"indexof(hidden, datum.{field}) < 0"}


HIDDEN: Spec = {"name": "hidden", "value": []}
"""The parameter with the names of hidden series."""
ZOOM: Spec = {
  "name": "zoom",
  "select": {"type": "interval", "zoom": "wheel![event.shiftKey]"},
  "bind": "scales",
}
"""Drag to move and Shift with the wheel to zoom. The wheel alone scrolls the page."""
NEAREST: Spec = {
  "name": "hover",
  "select": {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"},
}
"""Selects the point closest to the pointer."""


def rounded(value: Any, digits: int = 6) -> float | None:
  """A number for the data of a figure, with this number of significant digits, or None if it is not finite."""
  number = float(value)
  return float(f"{number:.{digits}g}") if math.isfinite(number) else None


def palette(entries: Sequence[Entry]) -> Spec:
  """The scale that gives each series its color."""
  return {"domain": [entry.series for entry in entries], "range": [entry.color for entry in entries]}
