"""Handles SIGINT and SIGTERM, so that a command stops cleanly within seconds and exits with the right exit code.

A signal raises `Interrupted` in the main thread, so that `with` and `finally` blocks release resources. Two cases need
special handling:

- Between two checkpoints, an exception would lose the training state. Within a `deferral`, a signal is only recorded;
  the training loop then stops after the current step and saves a checkpoint.
- Compilation and long computations run in C++, where no Python exception can be raised, and a library may suppress the
  exception. The console command therefore starts a thread (`watch`) that ends the process if it is still running after
  a grace period. Since files are written atomically, this does not damage them.

A second SIGINT ends the process immediately.
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
"""Seconds after which a process is ended if its main thread has not stopped."""

SAVED_PREEMPTION = 75


class Interrupted(KeyboardInterrupt):
  """Raised after SIGINT or SIGTERM. `continuation` describes the saved state."""


class _Process:
  """The signals that this process has received, and the functions to call before it exits."""

  def __init__(self) -> None:
    self.received: list[int] = []
    self.seen: list[int] = []
    """Signals that the thread of `watch` has received."""
    self.held = False
    """Whether signals are only recorded."""
    self.wakeup: int | None = None
    """File descriptor that wakes the thread of `watch`, or None if there is no such thread."""
    self.places: list[Callable[[], str | None]] = []
    self.cleanups: list[Callable[[], None]] = []
    self.leaving = threading.Lock()


_PROCESS = _Process()


def block() -> None:
  """Blocks SIGINT and SIGTERM until `watch` is called, also across an `exec`."""
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
  """The first stop signal that this process has received, even if the main thread has not handled it yet."""
  return next(iter(_PROCESS.received or _PROCESS.seen), None)


def deliver(number: int) -> None:
  """Acts as if this process had received a stop signal, unless it has received one already. Callable from any
  thread."""
  if first_signal() is None:
    os.kill(os.getpid(), number)


def at_the_end(function: Callable[[], None]) -> None:
  """Registers a function to call if a signal ends the process, in reverse order of registration."""
  _PROCESS.cleanups.append(function)


def received() -> bool:
  """Whether this process has received a stop signal."""
  return bool(_PROCESS.received)


def leave() -> NoReturn:
  """Ends a command that has received a stop signal, with a line on stderr and the exit code of the signal.

  After `watch`, the process exits without finalizing the interpreter, because XLA's running threads would crash.
  Otherwise, raises SystemExit.
  """
  if _PROCESS.wakeup is None:
    begin = "\n" if sys.stderr.isatty() else ""  # below a progress bar
    print(f"{begin}{stop_line()}", file=sys.stderr)
    sys.exit(exit_code())
  end(exit_code(), stop_line())


def end(code: int, line: str) -> NoReturn:
  """Ends this process immediately with a line on stderr and this exit code. Callable from any thread."""
  _PROCESS.leaving.acquire()  # never released, so that a second caller waits until the process ends
  for function in reversed(_PROCESS.cleanups):
    with contextlib.suppress(Exception):
      function()
  # A progress bar hides the cursor, which is in its last line.
  begin = "\x1b[?25h\n" if os.isatty(2) else ""
  # Write to the file descriptor, because the main thread may hold the lock of sys.stderr.
  with contextlib.suppress(OSError):
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # threads of XLA may print about the end of another process
    os.write(stderr, f"{begin}{line}\n".encode())
  os._exit(code)


def exit_now(code: int) -> NoReturn:
  """Exits without finalizing the interpreter. If another thread is calling `end`, its line and its exit code hold."""
  _PROCESS.leaving.acquire()
  os._exit(code)


def stop_line() -> str:
  """The message that is printed after a stop signal."""
  saved = continuation()
  return f"moejax: stopped by {_first().name}" + (f"; the same command continues from {saved}" if saved else "")


def exit_code() -> int:
  """130 after SIGINT. After SIGTERM, 75 if a saved state can be resumed, else 143."""
  if _first() == signal.SIGTERM and continuation():
    return SAVED_PREEMPTION
  return 128 + _first()


@contextlib.contextmanager
def continuing(where: Callable[[], str | None]) -> Iterator[None]:
  """A context in which `where` returns a description of the saved state, or None. It also applies after an
  exception."""
  _PROCESS.places.append(where)
  yield
  _PROCESS.places.remove(where)


def continuation() -> str | None:
  """Description of the saved state from which the same command resumes, from the innermost `continuing` that has
  one."""
  for where in reversed(_PROCESS.places):
    with contextlib.suppress(OSError):
      if place := where():
        return place
  return None


def finish() -> None:
  """Ignores signals from now on, because the command is done.

  Without this, a signal during the finalization of the interpreter would have its default effect. If another thread is
  calling `end`, it ends the process here.
  """
  _PROCESS.held = True
  with _PROCESS.leaving:
    pass
  for number in SIGNALS:
    signal.signal(number, signal.SIG_IGN)


def forget() -> None:
  """Resets the state at the start of a command, if another command has run in this process."""
  _PROCESS.places.clear()
  if _PROCESS.wakeup is None:
    _PROCESS.received.clear()


@contextlib.contextmanager
def cleanup(function: Callable[[], None]) -> Iterator[None]:
  """Calls `function` at the end of the block, even if a signal ends the process."""
  _PROCESS.cleanups.append(function)
  try:
    yield
  finally:
    _PROCESS.cleanups.remove(function)
    function()


class Deferral:
  """A section in which signals are only recorded while there is unsaved state."""

  @property
  def requested(self) -> bool:
    """Whether a signal was received."""
    return bool(_PROCESS.received)

  @property
  def signal(self) -> int:
    """The first signal that was received, or 0."""
    return _PROCESS.received[0] if _PROCESS.received else 0

  def accept(self, number: int) -> None:
    """Records a signal of another process of the program, unless this process has received one."""
    _PROCESS.received = _PROCESS.received or [number]

  def hold(self) -> None:
    """From now on, signals are only recorded."""
    _PROCESS.held = True

  def release(self) -> None:
    """From now on, signals raise Interrupted. Raises it immediately if a signal has been recorded."""
    _PROCESS.held = False
    if _PROCESS.received:
      raise Interrupted


@contextlib.contextmanager
def deferral() -> Iterator[Deferral]:
  """A section that can defer signals. Without `watch`, signal handlers are restored at its end.

  It has no effect outside the main thread, where Python does not handle signals.
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
  """Blocks signals. Processes that are started within it inherit the blocked signals."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _note(number: int, frame: FrameType | None) -> None:
  """The Python handler of both signals, which runs in the main thread."""
  first = not _PROCESS.received
  _PROCESS.received.append(number)
  if _PROCESS.wakeup is not None:  # an event loop may have replaced Python's wakeup descriptor
    with contextlib.suppress(OSError):
      os.write(_PROCESS.wakeup, b"\0")
  elif not first and number == signal.SIGINT:
    raise KeyboardInterrupt
  if first and not _PROCESS.held:
    raise Interrupted


def _unraisable(what: "sys.UnraisableHookArgs") -> None:
  """Handles exceptions in finalizers and weak reference callbacks, which Python would only print, even for a signal."""
  if isinstance(what.exc_value, Interrupted):
    leave()
  sys.__unraisablehook__(what)


def _watch(reading: int) -> None:
  """Ends the process after a second SIGINT, or if the main thread does not end it within the grace period."""
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
          text = f"moejax: {signal.Signals(all_received[0]).name}: stopping after this step; Ctrl-C stops immediately"
          print(text, file=sys.stderr)
    elif _PROCESS.held:
      deadline = time.monotonic() + GRACE_S
    else:
      _leave_with(seen)


def _leave_with(signals: list[int]) -> NoReturn:
  """Like `leave`, for another thread, when the main thread may not have handled the signals yet."""
  _PROCESS.received = _PROCESS.received or signals
  leave()


def _first() -> signal.Signals:
  return signal.Signals(_PROCESS.received[0]) if _PROCESS.received else signal.SIGINT
