"""What processes of one program tell each other, and what ends all of them. The processes are real, and need no JAX."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

BEGIN = """
import os, signal, sys, time
from moejax import interrupts, processes
from moejax.processes.channel import Channel
from moejax.processes.environment import CONNECT_TIMEOUT_S, HANG_TIMEOUT_S, given_place, seconds
from moejax.processes.rendezvous import connect
interrupts.block()
interrupts.watch()
def run():
  place = given_place()
  channel = Channel(place, connect(place, seconds(CONNECT_TIMEOUT_S)), seconds(HANG_TIMEOUT_S))
  time.sleep(float(os.environ.get("LATE_S", 0)) if place.index == 0 else 0)
  processes.joined(channel)
  me = processes.index()
"""
END = """
  processes.leave(0)
try:
  run()
except BaseException as error:
  if interrupts.received():
    interrupts.leave()
  raise SystemExit(f"{type(error).__name__}: {error}")
interrupts.finish()
"""


def sockets() -> list[str]:
  """The kernel's lines about TCP sockets."""
  return [line for name in ("tcp", "tcp6") for line in pathlib.Path(f"/proc/net/{name}").read_text().splitlines()]


def free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


@contextlib.contextmanager
def begun(body: str, count: int, only: list[int] | None = None, port: int = 0, **variables: str) -> Iterator[list]:
  """Processes that run `body`; `only` some of them. They are killed at the end."""
  address = f"127.0.0.1:{port or free_port()}"
  indented = "".join(f"  {line}\n" for line in body.splitlines())
  children = [
    subprocess.Popen(
      [sys.executable, "-c", f"{BEGIN}{indented}{END}"],
      env=os.environ
      | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
      | {"MOEJAX_HANG_TIMEOUT_S": "30", "MOEJAX_CONNECT_TIMEOUT_S": "60"}
      | variables,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in (only if only is not None else range(count))
  ]
  try:
    yield children
  finally:
    for child in children:
      child.kill()
      child.communicate()


def end_of(body: str, count: int, within_s: float = 60.0, **options) -> tuple[list[int], list[str]]:
  """Exit codes and outputs of processes that run `body`, in their order."""
  with begun(body, count, **options) as children:
    deadline = time.monotonic() + within_s
    outputs = [child.communicate(timeout=deadline - time.monotonic())[0] for child in children]
    return [child.returncode for child in children], outputs


def test_what_the_first_process_decides_and_what_all_say_reaches_every_process():
  body = "print(processes.first(lambda: {'of': me}), processes.gather(me * me), processes.first(lambda: None))"
  codes, outputs = end_of(body, 3)
  assert codes == [0, 0, 0] and [text.strip() for text in outputs] == ["{'of': 0} [0, 1, 4] None"] * 3


def test_a_function_that_leaves_files_runs_on_the_first_process_before_the_others(tmp_path):
  path = tmp_path / "file"
  body = (
    f"import pathlib\npath = pathlib.Path({str(path)!r})\n"
    "def make():\n  there = path.exists()\n  time.sleep(0.3)\n  path.write_text('')\n  return there\n"
    "print(processes.first_then_all(make))"
  )
  codes, outputs = end_of(body, 3)
  assert codes == [0, 0, 0] and [text.strip() for text in outputs] == ["False", "True", "True"]


def test_a_file_that_the_first_process_cannot_write_is_an_error_of_all():
  body = (
    "def full():\n  raise OSError(28, 'No space left on device', '/run/file')\n"
    "try:\n  processes.first_writes(full)\n"
    "except processes.NotWritten as error:\n  print(error.errno, error.strerror, error.filename)\n"
    "processes.first_writes(lambda: print('written by', me))"
  )
  codes, outputs = end_of(body, 3)
  told = "28 No space left on device /run/file\n"
  assert codes == [0, 0, 0] and outputs == [f"{told}written by 0\n", told, told]


@pytest.mark.parametrize("failing", [0, 1])
def test_where_one_process_fails_all_end_with_its_code_and_message(failing):
  body = f"if me == {failing}:\n  processes.fail(2, 'the file x is missing')\n  os._exit(2)\nprocesses.gather(me)"
  codes, outputs = end_of(body, 3, within_s=30)
  assert codes == [2, 2, 2]
  others = [text for index, text in enumerate(outputs) if index != failing]
  assert all(f"moejax: process {failing} (host " in text and "): the file x is missing" in text for text in others)


@pytest.mark.parametrize("victim", [0, 2])
def test_the_death_of_a_process_ends_the_others_at_once_and_names_it(victim):
  begin = time.monotonic()
  codes, outputs = end_of(f"if me == {victim}: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)", 3, within_s=30)
  assert time.monotonic() - begin < 30
  assert [code for index, code in enumerate(codes) if index != victim] == [1, 1]
  others = [text for index, text in enumerate(outputs) if index != victim]
  assert all(f"process {victim} (host " in text and "it ended without a message" in text for text in others)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_stopped_ends_the_others_within_the_bound_and_is_named(victim):
  with begun(
    f"if me == {victim}: os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)", 3, MOEJAX_HANG_TIMEOUT_S="1.5"
  ) as all3:
    others = [child for index, child in enumerate(all3) if index != victim]
    outputs = [child.communicate(timeout=30)[0] for child in others]
    assert [child.returncode for child in others] == [1, 1]
    assert all(f"process {victim} (host " in text and "has not responded for 1.5 s" in text for text in outputs)


def test_a_process_that_is_behind_in_training_ends_all_and_is_named():
  body = "processes.report_step(7 if me == 1 else 8)\ntime.sleep(60)"
  codes, outputs = end_of(body, 3, within_s=30, MOEJAX_HANG_TIMEOUT_S="2")
  assert codes == [1, 1, 1]
  assert all("process 1 (host " in text and "it has not started step 8 for" in text for text in outputs)


@pytest.mark.slow
def test_a_program_that_is_stopped_as_a_whole_goes_on_when_it_is_continued():
  """As SLURM suspends a job."""
  body = "processes.gather(me)\nprint('met', flush=True)\nfor _ in range(20): time.sleep(0.3)"
  with begun(body, 2, MOEJAX_HANG_TIMEOUT_S="4") as both:
    assert [child.stdout.readline().strip() for child in both] == ["met", "met"]
    for number, wait_s in ((signal.SIGSTOP, 8), (signal.SIGCONT, 0)):
      for child in both:
        child.send_signal(number)
      time.sleep(wait_s)
    outputs = [child.communicate(timeout=60)[0] for child in both]
    assert [child.returncode for child in both] == [0, 0], outputs


@pytest.mark.slow
def test_outside_training_a_process_may_be_behind():
  body = "processes.report_step(8 if me else None)\ntime.sleep(3)"
  assert end_of(body, 2, MOEJAX_HANG_TIMEOUT_S="1")[0] == [0, 0]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_process_is_one_to_all(name, code, told):
  body = f"if me == {told}: os.kill(os.getpid(), signal.{name})\ntime.sleep(60)"
  codes, outputs = end_of(body, 3, within_s=30)
  assert codes == [code] * 3 and all(f"moejax: stopped by {name}" in text for text in outputs)


def test_a_signal_from_another_process_waits_until_this_one_can_tell_the_others_that_it_leaves():
  """Process 2, which saves for a while, would otherwise take the end of process 0 for its death."""
  body = (
    "if me == 1: os.kill(os.getpid(), signal.SIGTERM)\n"
    "with interrupts.deferral() as section:\n  if me == 2:\n    section.hold()\n    time.sleep(4)\ntime.sleep(60)"
  )
  codes, outputs = end_of(body, 3, within_s=30, LATE_S="1")
  assert codes == [143] * 3 and all("moejax: stopped by SIGTERM" in text for text in outputs)


def test_missing_processes_are_named_after_the_deadline():
  codes, outputs = end_of("", 4, within_s=30, only=[0, 2], MOEJAX_CONNECT_TIMEOUT_S="2")
  assert codes == [1, 1]
  assert all(
    "processes 1, 3 of 4 did not reach process 0 at 127.0.0.1:" in text and "within 2 s" in text for text in outputs
  )


def test_a_missing_first_process_is_named_after_the_deadline():
  codes, (text,) = end_of("", 2, within_s=30, only=[1], MOEJAX_CONNECT_TIMEOUT_S="2")
  assert codes == [1] and "process 0 of 2 did not answer process 1 at 127.0.0.1:" in text


def test_strangers_at_the_port_are_turned_away():
  port = free_port()
  with begun("print(processes.gather(me))", 2, only=[0], port=port, MOEJAX_JOB="a") as (first,):
    deadline = time.monotonic() + 30
    strangers = []
    hello = b'{"index": 1, "count": 2, "job": "b", "name": "another"}\n'
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"index": 1e999}\n', hello, b""):
      while True:
        assert time.monotonic() < deadline
        with contextlib.suppress(ConnectionRefusedError):
          strangers.append(socket.create_connection(("127.0.0.1", port)))
          break
        time.sleep(0.05)
      strangers[-1].sendall(sent)
    codes, (text,) = end_of("print(processes.gather(me))", 2, only=[1], port=port, MOEJAX_JOB="a")
    assert codes == [0] and text.strip() == "[0, 1]" and first.communicate(timeout=30)[0].strip() == "[0, 1]"
    for stranger in strangers:
      stranger.close()


def test_only_the_interface_of_a_loopback_address_is_listened_on():
  port = free_port()
  with begun("", 2, only=[0], port=port) as (first,):
    deadline = time.monotonic() + 30
    while True:
      assert first.poll() is None and time.monotonic() < deadline
      listening = [line.split()[1] for line in sockets() if line.split()[3] == "0A"]
      mine = [address.rpartition(":")[0] for address in listening if int(address.rpartition(":")[2], 16) == port]
      if mine:
        break
      time.sleep(0.05)
  assert mine == ["0100007F"]
