"""Stopping on SIGINT and SIGTERM: cleanly, within seconds, at any moment, with an exit code that says what happened.

A signal raises `Interrupted` in the main thread, so that `with` and `finally` blocks close what is open. Two cases need
more than that:

- Between two checkpoints the training loop holds a state that an exception would lose. It is in a `deferral`, where the
  signal is only noted; the loop stops after the current step and saves.
- Compilation and long computations run in C++, where no Python exception can be raised, and a library may swallow one.
  The console command therefore starts a thread (`watch`) that ends the process if it is still running after a grace
  period. Files on disk are written whole or not at all, so nothing is damaged by that.

A second SIGINT ends the process at once.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)

GRACE_S = 3.0
"""Seconds that the main thread has to stop by itself."""

SAVED_PREEMPTION = 75


class Interrupted(KeyboardInterrupt):
  """SIGINT or SIGTERM was received; what `continuation` names is saved."""


class _Process:
  """What this process has received, and what it must still do before it ends."""

  def __init__(self) -> None:
    self.received: list[int] = []
    self.seen: list[int] = []
    """The same, as the watching thread sees them."""
    self.held = False
    """Whether a signal is only noted."""
    self.wakeup: int | None = None
    """Where a byte wakes the watching thread; None where there is none."""
    self.places: list[Callable[[], str | None]] = []
    self.cleanups: list[Callable[[], None]] = []
    self.leaving = threading.Lock()


_PROCESS = _Process()


def block() -> None:
  """Lets SIGINT and SIGTERM wait, also through an `exec`, until `watch`."""
  signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def watch() -> None:
  """Handles SIGINT and SIGTERM until the process ends. For the console command only: it may call `os._exit`."""
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  _PROCESS.wakeup = writing
  threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
  sys.unraisablehook = _unraisable
  for number in SIGNALS:
    signal.signal(number, _note)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def first_signal() -> int | None:
  """The first signal to stop that this process has received, also where the main thread has not yet noted it."""
  return next(iter(_PROCESS.received or _PROCESS.seen), None)


def deliver(number: int) -> None:
  """Acts as if this process had received a signal to stop, unless it has received one. For any thread."""
  if first_signal() is None:
    os.kill(os.getpid(), number)


def at_the_end(function: Callable[[], None]) -> None:
  """Calls `function`, after all that is registered later, if the process is ended by a signal."""
  _PROCESS.cleanups.append(function)


def received() -> bool:
  """Whether this process has received a signal to stop."""
  return bool(_PROCESS.received)


def leave() -> NoReturn:
  """Ends a command that received a signal to stop, with one line on stderr and its exit code.

  Under `watch` the process ends without tearing the interpreter down, in which XLA's threads, still running, crash.
  Elsewhere this raises SystemExit.
  """
  if _PROCESS.wakeup is None:
    print(f"\n{stop_line()}", file=sys.stderr)
    sys.exit(exit_code())
  end(exit_code(), stop_line())


def end(code: int, line: str) -> NoReturn:
  """Ends this process at once, from any thread, with a line on stderr and this exit code."""
  _PROCESS.leaving.acquire()  # never released: whoever comes second waits for the end
  for function in reversed(_PROCESS.cleanups):
    with contextlib.suppress(Exception):
      function()
  show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # hidden while a progress bar is drawn
  # Not through sys.stderr, whose lock the main thread may hold.
  with contextlib.suppress(OSError):
    os.write(2, f"{show_cursor}\n{line}\n".encode())
  os._exit(code)


def stop_line() -> str:
  """What the user reads after a stop."""
  saved = continuation()
  return f"moejax: stopped by {_first().name}" + (f"; the same command continues from {saved}" if saved else "")


def exit_code() -> int:
  """130 after SIGINT; after SIGTERM 75 if the same command continues from what is saved, else 143."""
  if _first() == signal.SIGTERM and continuation():
    return SAVED_PREEMPTION
  return 128 + _first()


@contextlib.contextmanager
def continuing(where: Callable[[], str | None]) -> Iterator[None]:
  """Within it, and after an exception in it, `where` says from what the same command continues (None: nothing yet)."""
  _PROCESS.places.append(where)
  yield
  _PROCESS.places.remove(where)


def continuation() -> str | None:
  """From what the same command continues: the innermost `continuing` that has something."""
  for where in reversed(_PROCESS.places):
    with contextlib.suppress(OSError):
      if place := where():
        return place
  return None


def finish() -> None:
  """The command is done: a signal no longer changes how the process ends.

  Ignored, not noted: while the interpreter is torn down, Python gives a signal that has a handler its default effect.
  """
  _PROCESS.held = True
  for number in SIGNALS:
    signal.signal(number, signal.SIG_IGN)


def forget() -> None:
  """A new command begins in this process: what an earlier one received and saved is not its own."""
  _PROCESS.places.clear()
  if _PROCESS.wakeup is None:
    _PROCESS.received.clear()


@contextlib.contextmanager
def cleanup(function: Callable[[], None]) -> Iterator[None]:
  """Calls `function` at the end of the block, also if the process is ended by a signal within it."""
  _PROCESS.cleanups.append(function)
  try:
    yield
  finally:
    _PROCESS.cleanups.remove(function)
    function()


class Deferral:
  """A section in which a signal is only noted while there is something to save."""

  @property
  def requested(self) -> bool:
    """Whether a signal was received."""
    return bool(_PROCESS.received)

  @property
  def signal(self) -> int:
    """The first signal that was received, 0 for none."""
    return _PROCESS.received[0] if _PROCESS.received else 0

  def accept(self, number: int) -> None:
    """Notes a signal that another process of the program has received, unless this one has one too."""
    _PROCESS.received = _PROCESS.received or [number]

  def hold(self) -> None:
    """From here on a signal is only noted."""
    _PROCESS.held = True

  def release(self) -> None:
    """From here on a signal raises Interrupted, as one that was noted does now."""
    _PROCESS.held = False
    if _PROCESS.received:
      raise Interrupted


@contextlib.contextmanager
def deferral() -> Iterator[Deferral]:
  """A section that can defer signals. Where no `watch` is, their handlers are restored at its end.

  Outside the main thread, where Python delivers no signals, nothing is deferred.
  """
  ours = _PROCESS.wakeup is None and threading.current_thread() is threading.main_thread()
  before = {number: signal.signal(number, _note) for number in SIGNALS} if ours else {}
  if ours:
    _PROCESS.received.clear()
  section = Deferral()
  try:
    yield section
    section.release()
  finally:
    _PROCESS.held = False
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
  """Signals wait; a process that is started within it begins with them blocked."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _note(number: int, frame: FrameType | None) -> None:
  """The handler of both signals, run by the main thread between two instructions of Python."""
  first = not _PROCESS.received
  _PROCESS.received.append(number)
  if _PROCESS.wakeup is not None:  # an event loop may have taken the descriptor that Python writes to
    with contextlib.suppress(OSError):
      os.write(_PROCESS.wakeup, b"\0")
  elif not first and number == signal.SIGINT:
    raise KeyboardInterrupt
  if first and not _PROCESS.held:
    raise Interrupted


def _unraisable(what: "sys.UnraisableHookArgs") -> None:
  """Called with an exception in a finalizer or a callback of a weak reference, from which none is raised: one of a
  signal would be printed and forgotten."""
  if isinstance(what.exc_value, Interrupted):
    leave()
  sys.__unraisablehook__(what)


def _watch(reading: int) -> None:
  """Ends the process at a second SIGINT, or when the main thread has not ended it within the grace period."""
  seen = _PROCESS.seen
  deadline: float | None = None
  while True:
    wait_s = None if deadline is None else max(0.0, deadline - time.monotonic())
    ready, _, _ = select.select([reading], [], [], wait_s)
    if ready:
      seen += [number for number in os.read(reading, 64) if number in SIGNALS]
      all_received = max(seen, _PROCESS.received, key=len)
      if len(all_received) > 1 and all_received[-1] == signal.SIGINT:
        _leave_with(all_received)
      if deadline is None and all_received:
        deadline = time.monotonic() + GRACE_S
        if _PROCESS.held:
          text = f"moejax: {signal.Signals(all_received[0]).name}: stopping after this step; Ctrl-C stops at once"
          print(text, file=sys.stderr)
    elif _PROCESS.held:
      deadline = time.monotonic() + GRACE_S
    else:
      _leave_with(seen)


def _leave_with(signals: list[int]) -> NoReturn:
  """As `leave`, from another thread, where the main thread may not have noted the signals."""
  _PROCESS.received = _PROCESS.received or signals
  leave()


def _first() -> signal.Signals:
  return signal.Signals(_PROCESS.received[0]) if _PROCESS.received else signal.SIGINT
