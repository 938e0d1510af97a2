"""Results in terminals of any width, and elsewhere."""

import io
import sys

import pytest
from rich.console import Console
from rich.table import Table

from moejax.terminal import Fitting, output

LONG = "a_name_of_an_experiment_that_is_long_and_must_stay_whole"


def printed(width: int) -> list[str]:
  table = Table("name", "what", title="title")
  table.add_row(LONG, "[bold]first[/bold]")
  table.add_row("b", "")
  console = Console(file=io.StringIO(), width=width)
  console.print(Fitting(table), soft_wrap=True)
  assert isinstance(console.file, io.StringIO)
  return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [120, 80, 60, 40])
def test_a_name_is_never_broken_in_two(width):
  lines = printed(width)
  assert any(LONG in line for line in lines)
  if width < len(LONG) + 10:
    assert lines == ["title", LONG, "  what  first", "b"]


def test_what_is_no_terminal_has_no_width(monkeypatch, capsys):
  monkeypatch.delenv("COLUMNS", raising=False)
  monkeypatch.setattr(sys, "stdout", io.StringIO())
  output().print("word " * 200)
  assert sys.stdout.getvalue().count("\n") == 1
  monkeypatch.setenv("COLUMNS", "80")
  assert output().width == 80
