"""The console command: `moejax`, or `python -m moejax`.

Only this file changes the process: it handles signals from the start, and restarts once for huge pages. Python code
calls `moejax.cli.main`, which does neither.
"""

import os
import sys
import traceback
from typing import NoReturn

from moejax import interrupts
from moejax.huge_pages import restart_with_huge_pages

IN_LARGE_ARRAYS = ("train", "compare", "evaluate")
"""Commands that run steps."""


QUIET = "ignore:resource_tracker:UserWarning"
"""A filter for processes that a command starts. A signal ends a command without tearing it down; Python's tracker then
removes the semaphores of its workers, and would warn of them after the command's last line."""


def command() -> NoReturn:
  """Runs the command line and exits."""
  interrupts.block()
  os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), QUIET)))
  for name in ("stdout", "stderr"):
    if getattr(sys, name) is None:  # it was closed by who started the process, as by `>&-`
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
    from moejax.cli import main  # takes longer than a user's Ctrl-C may wait to be handled

    main()
  except SystemExit as end:
    return end.code
  except BrokenPipeError:  # the reader, such as `head`, went away; what is not yet written goes nowhere
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
