"""The live display of a long command: what runs now, its figures, and the time left for all of it."""

import time
from types import TracebackType

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from moejax.progress import Progress

LINE_EVERY_S = 15.0
"""Seconds between two lines where the output is no terminal."""


class Display(Progress):
  """Two bars in a terminal, the whole command and what runs now; a line now and then elsewhere."""

  def __init__(self, title: str, console: Console | None = None):
    self.console = console or Console(stderr=True)
    self._progress = rich.progress.Progress(
      SpinnerColumn(),
      TextColumn("{task.description}"),
      BarColumn(bar_width=24),
      TextColumn("{task.fields[facts]}", markup=False),
      _TimeLeft(),
      console=self.console,
      disable=not self.console.is_terminal,
    )
    self._all = self._progress.add_task(f"[bold]{title}", total=None, facts="", left_s=None)
    self._now = self._progress.add_task("", total=None, facts="", left_s=None, visible=False)
    self._name, self._total = "", 0.0
    self._next_line = 0.0
    self._left_s: float | None = None

  def __enter__(self) -> "Display":
    self._progress.start()
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self._progress.stop()

  def stage(self, name: str, total: float | None = None) -> None:
    """Begins what runs now; `total` in the units of `advance`, None where unknown."""
    self._name, self._total = name, total or 0.0
    self._progress.reset(self._now, description=name, total=total, facts="", left_s=None, visible=True)
    self._progress.start_task(self._now)
    self._line(f"{name}", force=True)

  def advance(self, completed: float, facts: str = "") -> None:
    """What runs now has come this far; `facts` are its latest figures."""
    self._progress.update(self._now, completed=completed, facts=facts)
    part = f"{completed:.0f}/{self._total:.0f}" if self._total > 1 else ""
    self._line(f"{self._name} {part} {facts}")

  def whole(self, done_s: float, left_s: float | None) -> None:
    """The whole command: seconds of work done and left, None where not yet known."""
    total = None if left_s is None else done_s + left_s
    self._progress.update(self._all, completed=done_s, total=total, left_s=left_s)
    self._left_s = left_s

  def note(self, text: str) -> None:
    """A line that stays above the bars."""
    self.console.print(text, highlight=False, markup=False)

  def _line(self, text: str, force: bool = False) -> None:
    now = time.monotonic()
    if self.console.is_terminal or (now < self._next_line and not force):
      return
    self._next_line = now + LINE_EVERY_S
    left = "" if self._left_s is None else f", {_clock(self._left_s)} left in all"
    self.console.print(f"{text.rstrip()}{left}", highlight=False, markup=False)


def training_facts(
  loss: float, tokens_per_s: float | None = None, mfu: float | None = None, dropped: float | None = None
) -> str:
  """Loss and speed as the display shows them; MFU, and the part of experts' choices that was dropped, where known."""
  facts = [f"loss {loss:.3f}"]
  if tokens_per_s is not None:
    facts.append(f"{tokens_per_s:,.0f} tokens/s")
  if mfu is not None:
    facts.append(f"MFU {mfu:.1%}")
  if dropped is not None:
    facts.append(f"dropped {dropped:.1%}")
  return "  ".join(facts)


class _TimeLeft(ProgressColumn):
  """Time left as the command itself reckons it, or as the bar's pace suggests."""

  def render(self, task: Task) -> Text:
    left_s = task.fields.get("left_s")
    if left_s is None:
      left_s = task.time_remaining
    return Text("" if left_s is None else f"{_clock(left_s)} left", style="cyan")


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
