"""Messages of one line for exceptions that the user can fix."""

import errno
import os

import pytest

from moejax.errors import OF_THE_MACHINE, UserError, users_mistake

HOSTILE = "a\nb\r\x1b[2Jc\u2028d"


@pytest.mark.parametrize(
  "error",
  [
    UserError(HOSTILE),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), HOSTILE),
    OSError(errno.EACCES, HOSTILE),
    MemoryError(HOSTILE),
    RuntimeError(f"RESOURCE_EXHAUSTED: out of memory {HOSTILE}"),
    ValueError(f"{HOSTILE}: No space left on device"),
    ValueError(f"{HOSTILE}: os_error_code='28'"),
  ],
  ids=repr,
)
def test_a_message_is_one_line_whatever_it_quotes(error):
  wrapped = RuntimeError("outer")
  wrapped.__cause__ = error
  for raised in (error, wrapped):
    message = users_mistake(raised)
    assert message and message.isprintable(), repr(message)


def test_every_error_of_the_machine_has_its_file_and_a_remedy():
  for number, remedy in OF_THE_MACHINE.items():
    assert users_mistake(OSError(number, os.strerror(number), "f")) == f"{os.strerror(number)} (f); {remedy}"
  assert users_mistake(OSError(errno.ENOENT, "missing", "f")) is None
