"""The HTML of results in notebooks."""

import html
from collections.abc import Iterable


def html_table(title: str, rows: Iterable[tuple[str, object]]) -> str:
  """A table of names and values, all text escaped."""
  body = "".join(
    f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(_shown(value))}</td></tr>"
    for name, value in rows
  )
  return f"<table><caption>{html.escape(title)}</caption>{body}</table>"


def _shown(value: object) -> str:
  if isinstance(value, bool) or value is None:
    return str(value)
  if isinstance(value, int):
    return f"{value:,}"
  return f"{value:,.5g}" if isinstance(value, float) else str(value)
