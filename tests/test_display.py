"""The live display, in a terminal and elsewhere."""

import io
import re

import pytest
import rich.progress
from rich.console import Console
from rich.progress import ProgressSample

from moejax import display
from moejax.display import LINE_EVERY_S, Display
from moejax.progress import training_facts


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
  """The lines of a log, without the time that each begins with."""
  lines = text_of(console).splitlines()
  assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in lines), lines
  return [line[20:] for line in lines]


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


def test_outside_a_terminal_no_version_of_rich_ends_with_an_empty_line(plain, monkeypatch):
  monkeypatch.setattr(rich.progress.Progress, "stop", lambda bars: bars.console.print())  # as that of rich 13
  with Display("train x", plain) as shown:
    shown.stage("compile x")
  assert lines_of(plain) == ["compile x"]


def test_a_line_has_the_time_left_once_it_is_known_less_what_has_passed_since(plain, clock):
  with Display("compare x", plain) as shown:
    shown.stage("one", total=10)
    shown.whole(0.0, None)
    shown.stage("two", total=10)
    shown.whole(done_s=5.0, left_s=3661.4)
    shown.stage("three", total=10)
    clock[0] += LINE_EVERY_S
    shown.advance(5)
    shown.whole(done_s=50.0, left_s=64.6)
    clock[0] += LINE_EVERY_S
    shown.advance(6)
  assert lines_of(plain) == ["one", "two", "three", "three 5/10, 1:00:46 left", "three 6/10, 0:50 left"]


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


def test_a_log_has_a_line_each_so_many_steps_but_no_more_than_one_a_second(plain, clock):
  with Display("x", plain) as shown:
    shown.stage("train", total=25, line_every=5)
    for step in range(1, 26):
      clock[0] += 2.0 if step < 12 else 0.05
      shown.advance(step, f"loss {step}.0")
  # The 15th and 20th follow the 10th within a second; the last is told whenever it comes.
  assert lines_of(plain) == [
    "train",
    "train 5/25 loss 5.0",
    "train 10/25 loss 10.0",
    "train 15/25 loss 15.0",
    "train 25/25 loss 25.0",
  ]


def test_a_log_wraps_no_line(clock):
  narrow = Console(file=io.StringIO(), width=20)
  long = " ".join(["layers.blocks.0.attention.w_q_DNH"] * 9)
  with Display("x", narrow) as shown:
    shown.note(long)
    shown.stage(long)
  assert lines_of(narrow) == [long, long]


@pytest.mark.parametrize("terminal", [False, True])
def test_what_was_interrupted_by_other_stages_is_shown_again(terminal, clock):
  console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)
  with Display("x", console) as shown:
    shown.stage("train", total=8, line_every=2)
    clock[0] += LINE_EVERY_S
    shown.advance(2, "loss 2.0")
    with shown.aside():
      shown.stage("evaluate", total=40)
      clock[0] += LINE_EVERY_S
      shown.advance(40)
    clock[0] += LINE_EVERY_S
    shown.advance(4, "loss 1.0")
    task = shown._progress.tasks[1]
    assert (task.description, task.completed, task.total) == ("train", 4, 8)
  if not terminal:
    assert lines_of(console) == ["train", "train 2/8 loss 2.0", "evaluate", "evaluate 40/40", "train 4/8 loss 1.0"]


def test_in_a_narrow_terminal_each_bar_is_one_line_with_its_figures_and_the_name_gives_way():
  console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
  with Display("train " + "long_name" * 8, console) as shown:
    shown.stage("train " + "long_name" * 8, total=10)
    shown.advance(5, training_facts(2.34567, 12345.6))
    shown.whole(done_s=5.0, left_s=5999.6)
    page = Console(file=io.StringIO(), width=60)
    page.print(shown._progress.get_renderable())
  first, second = text_of(page).splitlines()
  assert "train" in first and "1:40:00 left" in first and "loss 2.346  12,346 tokens/s" in second


def test_there_is_one_time_left_at_a_time():
  """The bar of a stage has its own only where that of the whole command is unknown."""
  console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)

  def times() -> list[str]:
    with console.capture() as captured:
      console.print(shown._progress.get_renderable())
    return re.findall(r"[\d:]+ left", captured.get())

  with Display("x", console) as shown:
    shown.stage("train", total=10)
    for task in shown._progress.tasks[1:]:
      task._progress.extend(ProgressSample(float(i), 1.0) for i in range(3))
    assert times() == ["0:10 left"]
    shown.whole(done_s=5.0, left_s=99.6)
    assert times() == ["1:40 left"]
    shown.whole(done_s=5.0, left_s=None)
    assert times() == ["0:10 left"]


@pytest.mark.parametrize("width", [80, 120])
def test_both_bars_are_whole_at_the_end(width, clock):
  console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
  with Display("train x", console) as shown:
    shown.stage("train x", total=20)
    shown.whole(19.0, 1.0)
    shown.advance(20, training_facts(2.817, 72_692.0))
    shown.whole(18.0, None)  # the steps became faster
  drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text_of(console)).splitlines()
  last = [line for line in drawn if "train x" in line][-2:]
  assert [line.count("━") for line in last] == [10 if width == 80 else 24] * 2 and "╸" not in "".join(last)


def test_the_bars_of_what_failed_stay_as_they_were(clock):
  console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
  with pytest.raises(ValueError), Display("train x", console) as shown:
    shown.stage("train x", total=20)
    shown.advance(5)
    raise ValueError
  assert not shown._progress.finished
