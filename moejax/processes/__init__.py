"""The processes of one program: which of them this is, and what only the first one does. One process needs none of it.

Process 0 decides and writes files; the others are told. Errors need no exchange: where one process fails, all end with
its message.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from moejax import interrupts
from moejax.processes.channel import Channel

Result = TypeVar("Result")

VERDICT_S = 5.0
"""Seconds in which the end of another process becomes known after a collective operation has failed."""


class _Program:
  """This process's connection to the others; None where it is alone."""

  channel: Channel | None = None


def joined(channel: Channel) -> None:
  """This process is one of several from here on."""
  _Program.channel = channel
  interrupts.at_the_end(lambda: channel.leave(interrupts.exit_code()))
  channel.start()


def index() -> int:
  """This process's number, from 0."""
  return _Program.channel.place.index if _Program.channel else 0


def count() -> int:
  """Number of processes of this program."""
  return _Program.channel.place.count if _Program.channel else 1


def name(index: int) -> str:
  """How messages name a process: with its host and process ID."""
  return _Program.channel.names[index] if _Program.channel else "this process"


def is_first() -> bool:
  """Whether this is the process that decides, draws and writes files."""
  return index() == 0


def first(function: Callable[[], Result]) -> Result:
  """What `function` returns on process 0, which alone calls it: plain data, as for JSON. The others wait for it."""
  channel = _Program.channel
  if channel is None:
    return function()
  return channel.share(function() if channel.place.index == 0 else None)


def gather(value: Result) -> list[Result]:
  """What every process gives, by process, on all of them: plain data, as for JSON."""
  return _Program.channel.gather(value) if _Program.channel else [value]


def first_then_all(function: Callable[[], Result]) -> Result:
  """Calls `function` on process 0 and then on all others, which so find the files that it has left."""
  result = function() if is_first() else None
  first(lambda: None)
  return function() if result is None else result


def at(step: int | None) -> None:
  """Says which training step this process begins. Within training, a process that falls behind ends the program."""
  if _Program.channel:
    _Program.channel.at(step)


def fail(code: int, message: str) -> None:
  """Ends the other processes with this exit code and message; the caller ends this one."""
  if _Program.channel:
    _Program.channel.fail(code, message)


def failed() -> int | None:
  """The exit code with which this process has ended the others; None where it has not."""
  return _Program.channel.failed if _Program.channel else None


def await_verdict() -> None:
  """After an error that the end of another process may have caused: it then ends this one too, and is named."""
  if _Program.channel:
    time.sleep(VERDICT_S)


def leave(code: int) -> None:
  """This process is done."""
  if _Program.channel:
    _Program.channel.leave(code)
