"""Allows one program at a time in the directory of a run or a comparison, which all its processes share."""

import contextlib
import pathlib
import socket
import time
from collections.abc import Callable, Iterator

from moejax import processes
from moejax.errors import UserError
from moejax.lock import LOCK, InUse, locked

APPEARS_S = 60.0
"""Seconds that a file system may take to show one host what another has written."""


@contextlib.contextmanager
def exclusive(directory: pathlib.Path, what: str, note: Callable[[str], None], wait: bool = False) -> Iterator[None]:
  """`locked` by the first process of a program; its other processes work in the same directory with it.

  Raises:
    UserError: as `locked`, or the directory of this process is not that of the first.
  """
  with locked(directory, what, note, wait) if processes.is_first() else contextlib.nullcontext():
    _check_shared(directory)
    yield


@contextlib.contextmanager
def claimed(directory: pathlib.Path, what: str, note: Callable[[str], None]) -> Iterator[str | None]:
  """As `exclusive`, but if another program holds the directory, yields that program and does not hold it."""
  with contextlib.ExitStack() as claim:

    def enter() -> str | None:
      try:
        claim.enter_context(locked(directory, what, note))
      except InUse as other:
        return str(other.holder)
      return None

    yield processes.first(enter)


def _check_shared(directory: pathlib.Path) -> None:
  """Checks that this process finds the lock file of the first."""
  content = processes.first((directory / LOCK).read_text)
  deadline = time.monotonic() + APPEARS_S
  while not processes.is_first():
    with contextlib.suppress(OSError):
      if (directory / LOCK).read_text() == content:
        return
    if time.monotonic() > deadline:
      raise UserError(
        f"process {processes.index()} (host {socket.gethostname()}) does not find in {directory} what process 0 writes "
        "there; choose a --workdir on a file system that all hosts share"
      )
    time.sleep(0.1)
