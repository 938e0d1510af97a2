"""Where commands print their results, and tables that keep their names whole however narrow the terminal is."""

import os
import sys
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

UNLIMITED = 10_000
"""Columns of what is no terminal, such as a file or a pipe: nothing is wrapped there."""


def output(stderr: bool = False) -> Console:
  """A console for standard output: as wide as the terminal, or without a limit where it is none."""
  stream = sys.stderr if stderr else sys.stdout
  is_narrow = stream.isatty() or "COLUMNS" in os.environ
  return Console(stderr=stderr, width=None if is_narrow else UNLIMITED)


class Fitting:
  """A table; where the terminal is too narrow for it, one line for each cell, below the first cell of its row."""

  def __init__(self, table: Table):
    self.table = table

  def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
    needed = Measurement.get(console, options.update(width=UNLIMITED), self.table).maximum
    if needed <= options.max_width:
      yield self.table
      return
    if self.table.title:
      yield self.table.title
    heads = [str(column.header) for column in self.table.columns]
    for first, *rest in zip(*(list(column.cells) for column in self.table.columns), strict=True):
      yield _text(first)
      for head, cell in zip(heads[1:], rest, strict=True):
        if str(cell):
          yield Text(f"  {head:<{max(map(len, heads))}}  ").append_text(_text(cell))


def _text(cell: RenderableType) -> Text:
  return cell if isinstance(cell, Text) else Text.from_markup(str(cell))
