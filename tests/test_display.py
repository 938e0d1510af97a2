"""The live display, in a terminal and elsewhere."""

import io

import pytest
from rich.console import Console

from moejax import display
from moejax.display import LINE_EVERY_S, Display, training_facts


@pytest.fixture
def clock(monkeypatch):
  """The display's clock, in seconds; a test sets it."""
  now = [100.0]
  monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
  return now


def text_of(console: Console) -> str:
  assert isinstance(console.file, io.StringIO)
  return console.file.getvalue()


def lines_of(console: Console) -> list[str]:
  return text_of(console).splitlines()


@pytest.fixture
def plain() -> Console:
  return Console(file=io.StringIO(), width=100)


def test_outside_a_terminal_each_stage_is_a_line_and_progress_a_line_now_and_then(plain, clock):
  with Display("train x", plain) as shown:
    shown.stage("compile x")
    shown.stage("train x", total=200)
    shown.advance(1, "loss 5.500")
    clock[0] += LINE_EVERY_S - 0.1
    shown.advance(2, "loss 5.400")
    clock[0] += 0.1
    shown.advance(3, "loss 5.300")
    shown.advance(4, "loss 5.200")
  assert lines_of(plain) == ["compile x", "train x", "train x 3/200 loss 5.300"]


def test_a_line_has_the_time_left_in_all_once_it_is_known(plain, clock):
  with Display("compare x", plain) as shown:
    shown.stage("one", total=10)
    shown.whole(0.0, None)
    shown.stage("two", total=10)
    shown.whole(done_s=5.0, left_s=3661.4)
    shown.stage("three", total=10)
    shown.whole(done_s=50.0, left_s=64.6)
    clock[0] += LINE_EVERY_S
    shown.advance(5)
  assert lines_of(plain) == ["one", "two", "three, 1:01:01 left in all", "three 5/10, 1:05 left in all"]


def test_a_part_of_1_is_no_count(plain, clock):
  with Display("x", plain) as shown:
    shown.stage("text", total=1.0)
    clock[0] += LINE_EVERY_S
    shown.advance(0.5, "reading a.txt")
  assert lines_of(plain)[-1].split() == ["text", "reading", "a.txt"]


@pytest.mark.parametrize("terminal", [False, True])
def test_brackets_are_text_and_no_markup(terminal, clock):
  console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)
  with Display("x", console) as shown:
    shown.stage("text", total=1.0)
    shown.note("wrote [a]/b")
    clock[0] += LINE_EVERY_S
    shown.advance(0.5, "read c[/d].txt")
  assert "wrote [a]/b" in text_of(console) and "read c[/d].txt" in text_of(console)


def test_a_terminal_shows_the_command_what_runs_now_its_figures_and_the_time_left():
  console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
  with Display("compare x", console) as shown:
    shown.stage("train a", total=10)
    shown.advance(5, training_facts(2.34567, 12345.6))
    shown.whole(done_s=30.0, left_s=65.0)
    shown.note("a note above")
  text = text_of(console)
  assert "compare x" in text and "train a" in text and "loss 2.346  12,346 tokens/s" in text
  assert "1:05 left" in text and "a note above" in text


def test_a_failure_ends_the_display_and_goes_on_as_it_was(plain):
  with pytest.raises(ZeroDivisionError), Display("x", plain):
    raise ZeroDivisionError
  with Display("x", plain) as shown:
    shown.stage("again")
  assert lines_of(plain) == ["again"]


def test_figures_of_training():
  assert training_facts(2.34567) == "loss 2.346"
  assert training_facts(2.34567, 12345.6) == "loss 2.346  12,346 tokens/s"
