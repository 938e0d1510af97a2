"""Coordinates the processes of a multi-process program.

Process 0 makes decisions and writes files, and sends the decisions to the other processes. If a process fails, all
processes exit with its error message. In a program with a single process, these functions do not communicate.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from moejax import interrupts
from moejax.processes.channel import Channel

Result = TypeVar("Result")

FAILURE_REPORT_S = 5.0
"""Seconds to wait, after a collective operation has failed, for the report that another process has failed."""


class _Program:
  """The connection to the other processes, or None in a program with a single process."""

  channel: Channel | None = None


def joined(channel: Channel) -> None:
  """Makes this process part of a program with several processes."""
  _Program.channel = channel
  interrupts.at_the_end(lambda: channel.leave(interrupts.exit_code()))
  channel.start()


def index() -> int:
  """Index of this process, starting at 0."""
  return _Program.channel.place.index if _Program.channel else 0


def count() -> int:
  """Number of processes of this program."""
  return _Program.channel.place.count if _Program.channel else 1


def name(index: int) -> str:
  """Name of a process in messages, with its host and process ID."""
  return _Program.channel.names[index] if _Program.channel else "this process"


def is_first() -> bool:
  """Whether this is process 0, which makes decisions, shows progress and writes files."""
  return index() == 0


def first(function: Callable[[], Result]) -> Result:
  """Calls `function` on process 0 only and returns its result, which must be valid JSON, on all processes."""
  channel = _Program.channel
  if channel is None:
    return function()
  return channel.share(function() if channel.place.index == 0 else None)


class NotWritten(OSError):
  """Process 0 could not write a file. All processes raise it."""


def first_writes(function: Callable[[], None]) -> None:
  """Calls `function`, which writes files, on process 0. If it raises OSError, raises NotWritten on all processes."""

  def attempt() -> tuple[int | str | None, ...] | None:
    try:
      function()
    except OSError as error:
      return error.errno, error.strerror, error.filename and str(error.filename)
    return None

  if failure := first(attempt):
    raise NotWritten(*failure)


def gather(value: Result) -> list[Result]:
  """Returns the values of all processes, by index, on all processes. Values must be valid JSON."""
  return _Program.channel.gather(value) if _Program.channel else [value]


def wait_for_all() -> None:
  """Waits until all processes have called this. Call it after what takes longer on some of them, such as compilation:
  a collective operation that the processes start more than 30 seconds apart can fail."""
  gather(None)


def report(key: str, value: object) -> None:
  """Sends a value, plain data, to process 0 without waiting for it, from any thread. A key is used once."""
  if _Program.channel and not is_first():
    _Program.channel.report(key, value)


def await_reports(key: str) -> list[Any]:
  """Waits, on process 0, until all others have reported a value for the key; returns the values by process."""
  return _Program.channel.await_reports(key) if _Program.channel else []


def first_then_all(function: Callable[[], Result]) -> Result:
  """Calls `function` on process 0 and then on all others, which can use the files that process 0 has written."""
  result = function() if is_first() else None
  first(lambda: None)
  return function() if result is None else result


def report_step(step: int | None) -> None:
  """Reports that this process starts a training step (None: stops training). If a process falls behind, all fail."""
  if _Program.channel:
    _Program.channel.report_step(step)


def fail(code: int, message: str) -> None:
  """Makes the other processes exit with this code and message. The caller must end this process."""
  if _Program.channel:
    _Program.channel.fail(code, message)


def failed() -> int | None:
  """The exit code that this process has passed to `fail`, or None."""
  return _Program.channel.failed if _Program.channel else None


def await_failure_report() -> None:
  """Waits after an error that the failure of another process may have caused. If so, this process exits and names
  it."""
  if _Program.channel:
    time.sleep(FAILURE_REPORT_S)


def leave(code: int) -> None:
  """Tells the other processes that this process exits."""
  if _Program.channel:
    _Program.channel.leave(code)
