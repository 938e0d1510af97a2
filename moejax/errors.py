"""Exceptions that are reported as one line without a traceback."""

import errno
import os
import re
from collections.abc import Iterator

OF_THE_MACHINE = {
  errno.ENOSPC: "free some space, or choose a directory on another disk",
  errno.EDQUOT: "free some of your quota, or choose a directory on another disk",
  errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose a directory on another disk",
  errno.EROFS: "choose a directory that can be written",
  errno.EACCES: "change its permissions, or choose another path",
  errno.EPERM: "change its permissions, or choose another path",
  errno.EIO: "check the disk",
  errno.ESTALE: "check the network file system",
  errno.EISDIR: "move the directory away, or choose another path",
  errno.ENOTDIR: "move the file away, or choose another path",
  errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
"""Remedies for errors of the operating system."""

LESS_MEMORY = (
  "lower training.batch_size (or evaluation.batch_size), raise training.gradient_accumulation, set model.remat, "
  "or use more devices (mesh)"
)


_TENSORSTORE = re.compile(r"os_error_code='(\d+)'")
"""How TensorStore, with which Orbax reads and writes, reports errors of the operating system."""


class UserError(ValueError):
  """A mistake in the input of the user. The message is one line with the value, the limit and the remedy. The exit code
  is 2."""

  def __init__(self, message: str):
    super().__init__(printable(message))


class Failure(RuntimeError):
  """A failure of the environment, such as a disk that stays full or a missing process. The exit code is 1."""


def printable(message: str) -> str:
  """Escapes line ends, which would make two lines of one, and other characters that control a terminal. A message may
  quote what the user gave, such as the name of a file."""
  return "".join(c if c == " " or c.isprintable() else ascii(c)[1:-1] for c in message)


def users_mistake(error: BaseException) -> str | None:
  """Returns a message of one line for an exception that the user can fix, or None for a bug.

  In addition to UserError, these are errors of the operating system and of devices, such as a full disk, a path that is
  not writable and insufficient memory, even if a library has wrapped them in other exceptions.
  """
  for cause in chain(error):
    if isinstance(cause, UserError):
      return str(cause).partition("\n")[0]  # Grain appends lines to the messages of exceptions in its threads
    if isinstance(cause, OSError) and cause.errno in OF_THE_MACHINE:
      where = f" ({cause.filename})" if cause.filename else ""
      return printable(f"{cause.strerror or cause}{where}; {OF_THE_MACHINE[cause.errno]}")
    text = printable(" ".join(str(cause).split()))
    code = _TENSORSTORE.search(text)
    if code and (number := int(code[1])) in OF_THE_MACHINE and number != errno.EIO:  # which is damage of one file
      return f"{os.strerror(number)}; {OF_THE_MACHINE[number]}"
    if isinstance(cause, MemoryError) or ("RESOURCE_EXHAUSTED" in text and "memory" in text.lower()):
      return f"out of memory: {text[:200] or 'no host memory is available'}; {LESS_MEMORY}"
    if "No space left on device" in text:
      return f"No space left on device: {text[:200]}; {OF_THE_MACHINE[errno.ENOSPC]}"
  return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an exception and its causes."""
  while error is not None:
    yield error
    error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def reason(error: BaseException) -> str:
  """The first line of the message of an exception, or the name of its class if it has none."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]
