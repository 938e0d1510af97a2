"""Console output of commands, and tables that do not truncate names on narrow terminals."""

import os
import sys
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

UNLIMITED = 10_000
"""Width of output that is not a terminal, such as a file or a pipe, where nothing is wrapped."""


def output(stderr: bool = False) -> Console:
  """A console for standard output, as wide as the terminal, or of unlimited width if it is not a terminal."""
  stream = sys.stderr if stderr else sys.stdout
  is_narrow = stream.isatty() or "COLUMNS" in os.environ
  return Console(stderr=stderr, width=None if is_narrow else UNLIMITED)


class Fitting:
  """A table. If the terminal is too narrow, each cell has its own line below the first cell of its row."""

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
