"""Ensures that only one program at a time uses the directory of a run or a comparison."""

import contextlib
import pathlib
import socket
import time
from collections.abc import Callable, Iterator

from moejax import processes
from moejax.errors import UserError
from moejax.lock import LOCK, InUse, locked

APPEARS_S = 60.0
"""Maximum seconds until a file system shows one host what another host has written."""


@contextlib.contextmanager
def exclusive(directory: pathlib.Path, what: str, note: Callable[[str], None], wait: bool = False) -> Iterator[None]:
  """Locks a directory for all processes of a program. The first process holds the lock.

  Raises:
    UserError: If another program holds the lock (see `locked`), or the processes do not share the directory.
  """
  with locked(directory, what, note, wait) if processes.is_first() else contextlib.nullcontext():
    _check_shared(directory)
    yield


@contextlib.contextmanager
def claimed(directory: pathlib.Path, what: str, note: Callable[[str], None]) -> Iterator[str | None]:
  """Like `exclusive`, but if another program holds the lock, yields a description of that program instead of
  raising."""
  with contextlib.ExitStack() as claim:

    def enter() -> str | None:
      try:
        claim.enter_context(locked(directory, what, note))
      except InUse as other:
        return str(other.holder)
      return None

    yield processes.first(enter)


def _check_shared(directory: pathlib.Path) -> None:
  """Checks that this process can see the lock file of the first process."""
  content = processes.first((directory / LOCK).read_text)
  deadline = time.monotonic() + APPEARS_S
  while not processes.is_first():
    with contextlib.suppress(OSError):
      if (directory / LOCK).read_text() == content:
        return
    if time.monotonic() > deadline:
      raise UserError(
        f"process {processes.index()} (host {socket.gethostname()}) does not find the files of process 0 in "
        f"{directory}; choose a --workdir on a file system that all hosts share"
      )
    time.sleep(0.1)
