"""Shows the progress of a long command: the current stage, its metrics, and the remaining time."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from moejax import processes
from moejax.progress import Progress
from moejax.terminal import output

LINE_EVERY_S = 15.0
"""Seconds between two log lines of a stage if the output is not a terminal."""

STEP_LINE_EVERY_S = 1.0
"""Minimum seconds between two log lines of a stage that has `line_every`."""

NARROW = 100
"""Terminal width below which bars are short."""


class Display(Progress):
  """Shows two progress bars on a terminal, for the whole command and for the current stage. If the output is not a
  terminal, writes log lines with timestamps."""

  def __init__(self, title: str, console: Console | None = None):
    self.console = console or output(stderr=True)
    self._progress = rich.progress.Progress(
      SpinnerColumn(),
      _Name(table_column=Column()),  # the column that is shortened on a narrow terminal
      BarColumn(bar_width=24 if self.console.width >= NARROW else 10, table_column=Column(no_wrap=True)),
      TextColumn("{task.fields[facts]}", markup=False),
      _TimeLeft(self.left_s),
      console=self.console,
      disable=not self.console.is_terminal,
    )
    self._all = self._progress.add_task(title, total=None, facts="", whole=True)
    self._now = self._progress.add_task("", total=None, facts="", visible=False, whole=False)
    self._stage = _Stage("", None, None)
    self._last_line = -LINE_EVERY_S
    self._left_s: float | None = None
    self._told = 0.0

  def __enter__(self) -> "Display":
    """Nothing is shown before the first stage, so that an early error leaves only its message."""
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if kind is None:  # leave complete bars on the terminal
      for task, total in ((self._all, 1.0), (self._now, self._stage.total or 1.0)):
        self._progress.update(task, completed=total, total=total)
    if self.console.is_terminal:  # elsewhere, some versions of rich would write an empty line
      self._progress.stop()

  def stage(self, name: str, total: float | None = None, line_every: int | None = None) -> None:
    """Starts a stage. `total` is in the units of `advance`, or None if it is unknown.

    If the output is not a terminal, a line is written for each multiple of `line_every` or, if that is None, every few
    seconds.
    """
    self._begin(_Stage(name, total, line_every))
    self._line(name)

  def advance(self, completed: float, facts: str = "") -> None:
    """Sets the position of the current stage. `facts` are its latest metrics."""
    self._progress.update(self._now, completed=completed, facts=facts)
    if self._is_due(completed):
      total = self._stage.total or 0.0
      part = f"{completed:.0f}/{total:.0f}" if total > 1 else ""
      left_s = self.left_s()
      left = "" if left_s is None else f", {_clock(left_s)} left"
      self._line(" ".join(word for word in (self._stage.name, part, facts) if word) + left)

  @contextlib.contextmanager
  def aside(self) -> Iterator[None]:
    """A context for nested stages. The current stage is shown again after them."""
    stage, task = self._stage, self._progress.tasks[1]
    completed, facts = task.completed, task.fields["facts"]
    try:
      yield
    finally:
      self._begin(stage)
      self._progress.update(self._now, completed=completed, facts=facts)

  def whole(self, done_s: float, left_s: float | None) -> None:
    """Sets the seconds done and left of the whole command, or None while they are unknown."""
    total = None if left_s is None else done_s + left_s
    self._progress.update(self._all, completed=done_s, total=total)
    self._left_s, self._told = left_s, time.monotonic()

  def left_s(self) -> float | None:
    """Estimated seconds until the whole command is done, or None if unknown."""
    return None if self._left_s is None else max(0.0, self._left_s - (time.monotonic() - self._told))

  def note(self, text: str) -> None:
    """Prints a permanent line above the bars."""
    stamp = "" if self.console.is_terminal else time.strftime("%Y-%m-%d %H:%M:%S ")
    self.console.print(f"{stamp}{text}", highlight=False, markup=False, soft_wrap=True)

  def _begin(self, stage: "_Stage") -> None:
    self._progress.start()
    self._stage = stage
    self._progress.reset(self._now, description=stage.name, total=stage.total, facts="", visible=True, whole=False)
    self._progress.start_task(self._now)

  def _is_due(self, completed: float) -> bool:
    waited = time.monotonic() - self._last_line
    if not self._stage.line_every:
      return waited >= LINE_EVERY_S
    if completed == self._stage.total:
      return True
    return completed % self._stage.line_every == 0 and waited >= STEP_LINE_EVERY_S

  def _line(self, text: str) -> None:
    if not self.console.is_terminal:
      self._last_line = time.monotonic()
      self.note(text)


class StageLog(Progress):
  """The output of processes other than the first: a line with the process index at the start of each stage."""

  def __init__(self, console: Console | None = None):
    self.console = console or output(stderr=True)

  def stage(self, name: str, total: float | None = None, line_every: int | None = None) -> None:
    """A line."""
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {processes.index()}: {name}"
    self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def make_display(title: str) -> contextlib.AbstractContextManager[Progress]:
  """Returns the progress output of a command: a display on process 0, and log lines on the others."""
  return Display(title) if processes.is_first() else contextlib.nullcontext(StageLog())


@dataclasses.dataclass(frozen=True)
class _Stage:
  name: str
  total: float | None
  line_every: int | None


class _Name(ProgressColumn):
  """The name of a bar, on one line."""

  def render(self, task: Task) -> Text:
    style = "bold" if task.fields["whole"] else ""
    return Text(task.description, style=style, no_wrap=True, overflow="ellipsis")


class _TimeLeft(ProgressColumn):
  """The estimated time left: of the whole command or, if that is unknown, of the current stage."""

  def __init__(self, whole_left_s: Callable[[], float | None]):
    super().__init__(table_column=Column(no_wrap=True))
    self._whole_left_s = whole_left_s

  def render(self, task: Task) -> Text:
    whole_left_s = self._whole_left_s()
    left_s = whole_left_s if task.fields["whole"] else task.time_remaining if whole_left_s is None else None
    return Text("" if left_s is None else f"{_clock(left_s)} left", style="cyan")


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
