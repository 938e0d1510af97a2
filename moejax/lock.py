"""One process at a time in a directory: a lock file that says who holds it, and that a killed process leaves behind.

The operating system's lock on the file (flock) decides wherever it reaches: it is gone with its process. On a shared
file system it may not reach other hosts, so the holder also touches the file now and then, and a lock of another host
is taken over only when it has not been touched for long.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from moejax.errors import UserError
from moejax.interrupts import cleanup

LOCK = "lock"
"""Name of the file."""
TOUCH_S = 30.0
STALE_S = 300.0
"""Seconds without a touch after which another host's lock is stale."""


@dataclasses.dataclass(frozen=True)
class Holder:
  """Who holds a directory."""

  host: str
  pid: int
  started: float
  """Seconds since 1970."""
  what: str
  """What it does there, such as `train dense`."""

  def __str__(self) -> str:
    return f"`{self.what}` (host {self.host}, pid {self.pid}, started {_age(time.time() - self.started)} ago)"


@contextlib.contextmanager
def locked(directory: pathlib.Path, what: str, note: Callable[[str], None]) -> Iterator[None]:
  """Holds a directory, which is made where it is missing, until the end of the block.

  Args:
    directory: what is held; the lock file in it goes at the end.
    what: the work, for whoever is refused.
    note: called with a line where a stale lock is taken over.

  Raises:
    UserError: another process holds it, or it cannot be written.
  """
  path = directory / LOCK
  try:
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = _take(path, note)
  except OSError as error:
    reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
    raise UserError(f"cannot write to {directory}: {reason}; choose another directory") from error
  mine = Holder(socket.gethostname(), os.getpid(), time.time(), what)
  os.ftruncate(descriptor, 0)
  os.pwrite(descriptor, (json.dumps(dataclasses.asdict(mine)) + "\n").encode(), 0)
  done = threading.Event()
  threading.Thread(target=_touch, args=(path, done), name=f"lock {directory}", daemon=True).start()

  def release() -> None:
    done.set()
    path.unlink(missing_ok=True)  # while it is still locked: whoever waits for it then finds another file
    os.close(descriptor)

  with cleanup(release):
    yield


def holder(path: pathlib.Path) -> Holder | None:
  """Who wrote a lock file; None where there is none, or it is empty or damaged."""
  try:
    there = json.loads(path.read_text())
    return Holder(str(there["host"]), int(there["pid"]), float(there["started"]), str(there["what"]))
  except (FileNotFoundError, ValueError, TypeError, KeyError, OverflowError):
    return None


def _take(path: pathlib.Path, note: Callable[[str], None]) -> int:
  """The descriptor of the lock file, which this process now holds."""
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
      reaches = _flock(descriptor)
      if not _is_file(path, descriptor):  # its holder released it in between
        os.close(descriptor)
        continue
      there = holder(path)
      if there is not None:
        if not _is_stale(there, path, reaches):
          raise _refusal(path, there)
        note(f"took over the lock of {there}, which is no longer running")
      return descriptor
    except BlockingIOError:
      os.close(descriptor)
      raise _refusal(path, holder(path)) from None
    except BaseException:
      os.close(descriptor)
      raise


def _flock(descriptor: int) -> bool:
  """Locks a file; False where its file system has no such locks. Raises BlockingIOError if a process has it."""
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
  except BlockingIOError:
    raise
  except OSError:
    return False


def _is_stale(there: Holder, path: pathlib.Path, flock_reaches: bool) -> bool:
  if there.host == socket.gethostname():
    return flock_reaches or not _runs(there)
  return time.time() - path.stat().st_mtime > STALE_S


def _runs(there: Holder) -> bool:
  """Whether a process of this host with that id lives, and did when the lock was written."""
  try:
    os.kill(there.pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  try:
    return pathlib.Path(f"/proc/{there.pid}").stat().st_ctime <= there.started + 60
  except OSError:
    return True


def _is_file(path: pathlib.Path, descriptor: int) -> bool:
  try:
    return os.path.samestat(os.fstat(descriptor), path.stat())
  except FileNotFoundError:
    return False


def _refusal(path: pathlib.Path, there: Holder | None) -> UserError:
  who = there or "another process"
  return UserError(
    f"{path.parent} is in use by {who}; wait for it, stop it, or choose another directory"
    + (f" (if it is no longer running, delete {path})" if there and there.host != socket.gethostname() else "")
  )


def _touch(path: pathlib.Path, done: threading.Event) -> None:
  while not done.wait(TOUCH_S):
    with contextlib.suppress(OSError):
      os.utime(path)


def _age(seconds: float) -> str:
  minutes = int(seconds) // 60
  if minutes < 1:
    return f"{int(seconds)} s"
  return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
