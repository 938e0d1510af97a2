"""A process that is asked to stop: how soon it ends, with which exit code and line, and what it still does."""

import signal
import subprocess
import sys
import time

import pytest

BEGIN = """
import os, signal, sys, time, ctypes
from moejax import interrupts
interrupts.GRACE_S = 0.5
interrupts.block()
def ask(name=sys.argv[1]):
  os.kill(os.getpid(), getattr(signal, name))
def go():
  interrupts.watch()
  run()
  interrupts.finish()
"""
END = """
try:
  go()
except BaseException:
  if interrupts.received():
    interrupts.leave()
  raise
"""
# Each is the body of a process that asks itself to stop. `sleep` of the C library stands for a compilation: no Python
# runs meanwhile.
BODIES = {
  "before the command begins": "ask()\ndef run(): time.sleep(30)",
  "while Python runs": "def run():\n  ask()\n  time.sleep(30)",
  "within a block that cleans up": (
    "def run():\n  try:\n    ask()\n    time.sleep(30)\n  finally:\n    print('cleaned', flush=True)"
  ),
  "swallowed": "def run():\n  try:\n    ask()\n    time.sleep(1)\n  except BaseException: pass\n  time.sleep(30)",
  "within a finalizer": (
    "class Final:\n  def __del__(self): ask(); time.sleep(1)\n"
    "def run():\n  Final()\n  while True: time.sleep(0.01); print('goes on', flush=True)"
  ),
  "turned into another exception": (
    "def run():\n  try:\n    ask()\n    time.sleep(1)\n  except BaseException as error: raise ImportError from error"
  ),
  "within C": (
    "import threading\ndef run():\n  threading.Timer(0.3, ask).start()\n"
    "  with interrupts.cleanup(lambda: print('cleaned', flush=True)): ctypes.CDLL(None).sleep(30)"
  ),
}
CLEANED = ("within a block that cleans up", "within C")


def stop(body: str, name: str) -> tuple[int, str, str]:
  """Exit code, stdout and stderr of a process with this body, which a signal of this name stops."""
  begin = time.monotonic()
  command = [sys.executable, "-c", f"{BEGIN}{body}{END}", name]
  done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
  assert time.monotonic() - begin < 20
  return done.returncode, done.stdout, done.stderr.removesuffix("\n")  # no other empty line, as in a log


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("when", BODIES)
def test_a_signal_ends_the_process_at_any_moment_with_one_line(when, name, code):
  out = "cleaned\n" if when in CLEANED else ""
  assert stop(BODIES[when], name) == (code, out, f"moejax: stopped by {name}")


HELD = """
import threading
def run():
  with interrupts.deferral() as section:
    section.hold()
    ask()
    {meanwhile}
    time.sleep(1.5)  # longer than the grace period
    saved.append("step 3")
    section.release()
saved = []
begun = interrupts.continuing(lambda: saved[0] if saved else None)
begun.__enter__()
"""


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 75)])
def test_a_section_that_saves_is_left_when_it_has_saved_and_the_line_says_from_where_to_continue(name, code):
  found, _, err = stop(HELD.format(meanwhile=""), name)
  assert found == code
  first, last = err.split("\n")
  assert first == f"moejax: {name}: stopping after this step; Ctrl-C stops immediately"
  assert last == f"moejax: stopped by {name}; the same command continues from step 3"


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_ctrl_c_stops_at_once_and_does_not_say_that_anything_is_saved(name, code):
  again = "threading.Timer(0.3, lambda: ask('SIGINT')).start(); ctypes.CDLL(None).sleep(30)"
  found, _, err = stop(HELD.format(meanwhile=again), name)
  assert (found, err.split("\n")[-1]) == (code, f"moejax: stopped by {name}")


def test_a_signal_during_exec_is_not_lost():
  """The command replaces its process for huge pages; a signal meanwhile stops the new one."""
  again = (
    "if not os.environ.get('AGAIN'):\n  ask()\n  os.environ['AGAIN'] = '1'\n  os.execv(sys.executable, sys.orig_argv)\n"
  )
  found, _, err = stop(f"{again}def run(): time.sleep(30)", "SIGTERM")
  assert (found, err) == (143, "moejax: stopped by SIGTERM")


def test_without_watch_handlers_are_restored_and_the_signal_is_an_exception():
  from moejax import interrupts

  interrupts.forget()  # what other tests of this process saved
  before = [signal.getsignal(number) for number in interrupts.SIGNALS]
  with pytest.raises(interrupts.Interrupted), interrupts.deferral() as section:
    section.hold()
    signal.raise_signal(signal.SIGTERM)
    assert section.requested
    section.release()
  assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before
  assert interrupts.exit_code() == 143
  with interrupts.deferral() as section:
    assert not section.requested


@pytest.mark.parametrize("then", ["interrupts.exit_now(1)", "interrupts.finish(); sys.exit(1)"])
def test_the_line_of_a_thread_that_ends_the_process_is_printed_even_if_the_main_thread_exits_meanwhile(then):
  body = (
    "import threading\nbegun = threading.Event()\n"
    "interrupts.at_the_end(lambda: (begun.set(), time.sleep(0.5)))\n"
    "interrupts.watch()\n"
    "threading.Thread(target=interrupts.end, args=(3, 'another process failed'), daemon=True).start()\n"
    f"begun.wait()\n{then}"
  )
  done = subprocess.run(
    [sys.executable, "-c", BEGIN + body, "SIGINT"], capture_output=True, text=True, timeout=60, check=False
  )
  assert (done.returncode, done.stderr.strip()) == (3, "another process failed")
