"""Implements the commands. A command imports JAX only if it needs it, so that the others start fast."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from moejax import interrupts, lookup, processes
from moejax.command_line import make_parser
from moejax.errors import Failure, UserError, reason, users_mistake
from moejax.gpu_memory import use_gpu_memory
from moejax.user_files import failure_of_users_code

USERS_MISTAKE = 2


def main(arguments: Sequence[str] | None = None) -> NoReturn:
  """Runs one command and raises SystemExit with its exit code. The README lists the exit codes.

  It can be called from Python: unlike the console command (`moejax.__main__`), it does not restart the process, and it
  restores signal handlers.

  Raises:
    SystemExit: When the command is done. Any other exception is a bug.
  """
  interrupts.forget()
  use_gpu_memory()
  try:
    given = sys.argv[1:] if arguments is None else arguments
    known, overrides = make_parser(given[0] if given else "").parse_known_args(given)
    for file in known.imports:
      lookup.import_file(str(file))
    code = known.verb(known, overrides)
    sys.stdout.flush()
  except (Exception, KeyboardInterrupt) as error:
    # A library may have replaced the exception that a signal raised.
    if interrupts.received() or isinstance(error, KeyboardInterrupt):
      interrupts.leave()
    if isinstance(error, processes.NotWritten) and not processes.is_first():
      processes.await_failure_report()  # by process 0, whose failure it is
    failure = isinstance(error, Failure | FloatingPointError)
    mistake = None if failure else users_mistake(error)
    of_user = None if failure or isinstance(error, UserError) else failure_of_users_code(error)
    if of_user is not None:
      frames, line = of_user
      print(f"{frames}moejax: {line}", file=sys.stderr)
      processes.fail(1, line)
      sys.exit(1)
    if mistake is None and not failure:
      processes.await_failure_report()
      processes.fail(1, f"{type(error).__name__}: {reason(error)}")
      raise
    print(f"moejax: {mistake or error}", file=sys.stderr)
    code = 1 if mistake is None else USERS_MISTAKE
    processes.fail(code, mistake or str(error))
  sys.exit(code)
