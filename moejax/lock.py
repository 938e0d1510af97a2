"""Ensures that only one process at a time uses a directory, with a lock file that describes its holder.

The operating system's lock on the file (flock) is released when a process ends, even if it is killed. On a shared file
system, however, it may not be visible to other hosts. There the existence of the file is the lock: only one host can
create it, the holder updates its modification time regularly, and a lock of another host is taken over only if it has
not been updated for a long time.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from moejax.errors import UserError
from moejax.files import read_json
from moejax.interrupts import cleanup

LOCK = "lock"
"""Name of the lock file."""
TOUCH_S = 30.0
STALE_S = 300.0
"""Seconds without an update after which the lock of another host is stale."""
WRITTEN_S = 5.0
"""Maximum seconds between creating a lock file and writing its content."""
POLL_S = 0.2
"""Seconds between two checks of a lock that another process holds."""


@dataclasses.dataclass(frozen=True)
class Holder:
  """The process that holds a lock."""

  host: str
  pid: int
  started: float
  """Seconds since 1970."""
  what: str
  """Its command, such as `train dense`."""

  def __str__(self) -> str:
    return f"`{self.what}` (host {self.host}, pid {self.pid}, started {_age(time.time() - self.started)} ago)"


class InUse(UserError):
  """Another process holds the directory."""

  def __init__(self, path: pathlib.Path, holder: Holder | None):
    self.holder = holder or "another process"
    self.who = holder and (holder.host, holder.pid, holder.started)
    """Identifies the holder uniquely, or None if it is unknown."""
    remote = holder is not None and holder.host != socket.gethostname()
    super().__init__(
      f"{path.parent} is in use by {self.holder}; wait for it, stop it, or choose another directory"
      + (f" (if it is no longer running, delete {path})" if remote else "")
    )


@contextlib.contextmanager
def locked(directory: pathlib.Path, what: str, note: Callable[[str], None], wait: bool = False) -> Iterator[None]:
  """Locks a directory until the end of the block. Creates the directory if necessary.

  Args:
    directory: the directory. The lock file in it is removed at the end.
    what: description of the work, for messages of other processes.
    note: called with a message when a stale lock is taken over or another process has to be waited for.
    wait: whether to wait until another process releases the directory.

  Raises:
    InUse: If another process holds the lock and `wait` is False.
    UserError: If the directory is not writable.
  """
  path = directory / LOCK
  try:
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = _wait(path, note) if wait else _take(path, note)
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
    path.unlink(missing_ok=True)  # while it is locked, so that a waiting process notices it
    os.close(descriptor)

  with cleanup(release):
    yield


def holder(path: pathlib.Path) -> Holder | None:
  """Reads the holder from a lock file. Returns None if the file does not exist, is empty or is damaged."""
  try:
    there = read_json(path)
    return Holder(str(there["host"]), int(there["pid"]), float(there["started"]), str(there["what"]))
  except (FileNotFoundError, ValueError, TypeError, KeyError, OverflowError):
    return None


def _wait(path: pathlib.Path, note: Callable[[str], None]) -> int:
  """Waits until no other process holds the lock, and takes it."""
  told: object = ()
  while True:
    try:
      return _take(path, note)
    except InUse as other:
      if other.who != told:
        note(f"waiting for {other.holder}")
      told = other.who
      time.sleep(POLL_S)


def _take(path: pathlib.Path, note: Callable[[str], None]) -> int:
  """Takes the lock and returns the descriptor of the lock file."""
  left_by: Holder | None = None
  while True:
    descriptor, created = _open(path)
    try:
      reaches = _flock(descriptor, created)
      there, status = holder(path), os.fstat(descriptor)
      if not _is_file(path, descriptor):  # its holder has released it in the meantime
        pass
      elif created or (reaches and there is not None and there.host == socket.gethostname()):
        if left_by := left_by or there:
          note(f"took over the lock of {left_by}, which is no longer running")
        return descriptor
      elif not status.st_size and 0 <= _now(path.parent) - status.st_mtime < WRITTEN_S:
        time.sleep(POLL_S / 10)  # its creator has not written its content yet
      elif there is not None and not _is_stale(there, _now(path.parent) - status.st_mtime):
        raise InUse(path, there)
      else:
        _remove(path, descriptor)
        left_by = there
    except BlockingIOError:
      os.close(descriptor)
      raise InUse(path, holder(path)) from None
    except BaseException:
      os.close(descriptor)
      raise
    os.close(descriptor)


def _open(path: pathlib.Path) -> tuple[int, bool]:
  """Opens the lock file. Returns the descriptor and whether this process created it, which only one host can do."""
  flags = os.O_RDWR | os.O_CLOEXEC
  while True:
    with contextlib.suppress(FileExistsError):
      return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
    with contextlib.suppress(FileNotFoundError):  # it was removed in the meantime
      return os.open(path, flags), False


def _remove(path: pathlib.Path, descriptor: int) -> None:
  """Removes a stale lock file. If another host has just replaced it by its own, restores that."""
  aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
  with contextlib.suppress(FileNotFoundError):
    path.rename(aside)
    if not _is_file(aside, descriptor):
      with contextlib.suppress(FileExistsError):
        os.link(aside, path)
    aside.unlink()


def _flock(descriptor: int, wait: bool) -> bool:
  """Locks a file. Returns False if the file system does not support it. Raises BlockingIOError if it is locked."""
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    return True
  except BlockingIOError:
    raise
  except OSError:
    return False


def _is_stale(there: Holder, age_s: float) -> bool:
  """Whether a lock file that is not locked by flock was left by a process that has ended."""
  return not _runs(there) if there.host == socket.gethostname() else age_s > STALE_S


def _now(directory: pathlib.Path) -> float:
  """Seconds since 1970 by the clock that sets modification times, which is that of the server on a shared file system.
  The clock of this host may differ."""
  with tempfile.TemporaryFile(dir=directory) as file:
    os.utime(file.fileno())
    return os.fstat(file.fileno()).st_mtime


def _runs(there: Holder) -> bool:
  """Whether the process that wrote the lock is still running on this host."""
  try:
    os.kill(there.pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  age_s = _process_age_s(there.pid)
  return age_s is None or age_s > time.time() - there.started - 60  # else it is a new process with the same ID


def _process_age_s(pid: int) -> float | None:
  """Seconds since a process of this host was started, or None if they are unknown."""
  try:
    ticks = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])  # see proc_pid_stat(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
  except (OSError, ValueError, IndexError, AttributeError):  # it has ended, or this is not Linux
    return None


def _is_file(path: pathlib.Path, descriptor: int) -> bool:
  try:
    return os.path.samestat(os.fstat(descriptor), path.stat())
  except FileNotFoundError:
    return False


def _touch(path: pathlib.Path, done: threading.Event) -> None:
  while not done.wait(TOUCH_S):
    with contextlib.suppress(OSError):
      os.utime(path)


def _age(seconds: float) -> str:
  seconds = max(0.0, seconds)  # the clocks of two hosts may differ
  minutes = int(seconds) // 60
  if minutes < 1:
    return f"{int(seconds)} s"
  return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
