"""Draws figures as SVG and PNG, and makes the script with which the page draws them itself."""

import functools
import json
import re
import textwrap
from collections.abc import Mapping
from typing import Any

import vl_convert

from moejax.comparison import palette
from moejax.comparison.plots.figure import SCHEMA, Spec

VERSION = "6.4"
"""The version of Vega-Lite for which the specifications are written."""
LINE = 92
"""Maximum number of characters in a line of a statement."""
FONT = "Liberation Sans, Arial, sans-serif"


def theme(font: str = FONT) -> dict[str, Any]:
  """The Vega-Lite configuration of all figures. Its colors are variables of the page."""
  text = {"labelFont": font, "titleFont": font, "labelFontSize": 12, "titleFontSize": 12}
  return {
    "background": "transparent",
    "font": font,
    "padding": 8,
    "view": {"stroke": None},
    "axis": text
    | {
      "labelColor": "var(--ink)", "titleColor": "var(--ink)", "titleFontWeight": "normal", "titlePadding": 8,
      "gridColor": "var(--line)", "domainColor": "var(--axis)", "tickColor": "var(--axis)", "tickCount": 6,
      "labelOverlap": "greedy", "labelSeparation": 6, "labelLimit": 160,
    },
    "legend": text
    | {
      "labelColor": "var(--ink)", "titleColor": "var(--ink)", "titleFontWeight": "normal", "orient": "top",
      "labelLimit": 260, "columns": 3, "symbolStrokeWidth": 2,
    },
    "header": {"labelColor": "var(--ink)", "titleColor": "var(--ink)", "labelFont": font, "labelFontSize": 12,
               "labelAnchor": "start", "labelPadding": 4},
    "title": {"color": "var(--ink)", "font": font, "fontSize": 13, "fontWeight": 600, "anchor": "start",
              "frame": "bounds", "subtitleColor": "var(--ink)", "subtitleFont": font, "subtitleFontSize": 11.5,
              "subtitlePadding": 6, "offset": 10},
    "text": {"font": font, "fontSize": 11.5, "color": "var(--ink)"},
  }  # fmt: skip


def draw(spec: Spec, title: str, statement: str, colors: Mapping[str, str]) -> tuple[str, bytes]:
  """The SVG and the PNG of a specification, on a white page with these colors, below a title and a statement."""
  heading = {"text": title} | ({"subtitle": textwrap.wrap(statement, LINE)} if statement else {})
  whole = {"$schema": SCHEMA, "title": heading} | spec
  whole["config"] = theme() | {"background": colors["card"]}
  resolved = json.loads(palette.resolve(json.dumps(whole), colors))
  svg = _numbered(vl_convert.vegalite_to_svg(resolved, vl_version=VERSION))
  return svg, vl_convert.svg_to_png(svg, scale=2.0)


def _numbered(svg: str) -> str:
  """Numbers the ids of clip paths and gradients from 0. Vega counts on from one drawing to the next."""
  ids = dict.fromkeys(re.findall(r'id="((?:clip|gradient_)\w+)"', svg))
  places = {name: f"{name.rstrip('0123456789')}{i}" for i, name in enumerate(ids)}
  return re.sub(r'(id="|url\(#)((?:clip|gradient_)\w+)', lambda found: found[1] + places.get(found[2], found[2]), svg)


@functools.cache
def library() -> str:
  """The script that draws Vega-Lite specifications in a browser. It loads nothing."""
  script = vl_convert.javascript_bundle(None, vl_version=VERSION)  # type: ignore[arg-type]
  return script.replace("</script", "<\\/script")
