"""The console command: `moejax`, or `python -m moejax`.

Only this file changes the state of the process: it installs signal handlers and restarts the process once to enable
huge pages. To run a command from Python, call `moejax.cli.main`, which does neither.
"""

import os
import sys
import traceback
from typing import NoReturn

from moejax import interrupts
from moejax.huge_pages import restart_with_huge_pages

IN_LARGE_ARRAYS = ("train", "compare", "evaluate")
"""Commands that run training steps."""


QUIET = "ignore:resource_tracker:UserWarning"
"""Warning filter for child processes. If a signal ends a command without the usual cleanup, Python's resource tracker
removes the semaphores of its workers and would print a warning after the last line of the command."""


def command() -> NoReturn:
  """Runs the command line and exits."""
  interrupts.block()
  os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), QUIET)))
  for name in ("stdout", "stderr"):
    if getattr(sys, name) is None:  # it was closed by the parent process, as with `>&-`
      setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
  if sys.argv[1:2] and sys.argv[1] in IN_LARGE_ARRAYS and not {"-h", "--help"} & {*sys.argv}:
    restart_with_huge_pages()
  try:
    interrupts.watch()
    code = _run()
    interrupts.finish()
  except BaseException:
    if interrupts.received():
      interrupts.leave()
    raise
  sys.exit(code)


def _run() -> int | str | None:
  try:
    from moejax.cli import main  # slow, so signals must be handled before it

    main()
  except SystemExit as end:
    return end.code
  except BrokenPipeError:  # the reader, such as `head`, has exited; discard the remaining output
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except Exception:
    if not interrupts.received():
      traceback.print_exc()
      print("moejax: this is a bug in moejax; please report it with the lines above", file=sys.stderr)
      return 1
    raise


if __name__ == "__main__":
  command()
