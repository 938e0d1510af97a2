"""Starts a command as several processes of one program on this machine: `python -m moejax.launch.local --processes 2
--devices-per-process 4 -- moejax train ...`.

The processes find each other over the loopback interface, which other machines cannot reach. On CPU, each process has
simulated devices. On a machine with NVIDIA GPUs, each process has some of the GPUs. Each line of output starts with the
index of its process. Ctrl-C and SIGTERM are forwarded. If a process fails, the others are ended, and the launcher exits
with its exit code. If the launcher is killed, the processes receive SIGTERM.
"""

import argparse
import ctypes
import dataclasses
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import BinaryIO

FAILED_S = 5.0
"""Seconds within which the other processes must exit after one has failed, and again after SIGTERM."""

STOPPED = (75, 130, 143)
"""Exit codes after a signal."""
NOT_RESTARTED = (0, 2, 3, *STOPPED)
"""Exit codes after which the command is not restarted: a mistake, or a requested stop."""


@dataclasses.dataclass(frozen=True)
class Launch:
  """The processes to start."""

  command: tuple[str, ...]
  processes: int
  devices_per_process: int
  gpus: bool
  """Whether devices are GPUs instead of simulated CPU devices."""
  connect_timeout_s: float
  hang_timeout_s: float

  def environment(self, index: int, port: int, job: str) -> dict[str, str]:
    """Environment variables of process `index`."""
    mine = range(index * self.devices_per_process, (index + 1) * self.devices_per_process)
    of_devices = {
      "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
      "XLA_FLAGS": f"{_flags()} --xla_force_host_platform_device_count={self.devices_per_process}".strip(),
    }
    return {
      **os.environ,
      "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
      "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
      "JAX_NUM_PROCESSES": str(self.processes),
      "JAX_PROCESS_ID": str(index),
      "MOEJAX_JOB": job,
      "MOEJAX_CONNECT_TIMEOUT_S": f"{self.connect_timeout_s:g}",
      "MOEJAX_HANG_TIMEOUT_S": f"{self.hang_timeout_s:g}",
      **({"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, mine))} if self.gpus else of_devices),
    }


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command, restarts it after failures if restarts are left, and returns its exit code."""
  known = _parser().parse_args(arguments)
  command = known.command[1:] if known.command[:1] == ["--"] else known.command
  if not command:
    _parser().error("give the command after --, such as -- moejax train NAME --workdir DIR")
  gpus = known.gpus if known.gpus is not None else _has_gpus()
  launch = Launch(
    (*_found(command[0]), *command[1:]),
    known.processes,
    known.devices_per_process,
    gpus,
    known.connect_timeout,
    known.hang_timeout,
  )
  group = _Group(launch)
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, group.pass_on)
  for restarts_left in range(known.max_restarts, -1, -1):
    code = group.run()
    if code in NOT_RESTARTED or group.asked or not restarts_left:
      return code
    _say(f"exit code {code}; restarting ({restarts_left} restart{'s' if restarts_left > 1 else ''} left)")
  return code


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="python -m moejax.launch.local", description=__doc__)
  parser.add_argument("--processes", type=_positive, required=True, help="number of processes")
  parser.add_argument("--devices-per-process", type=_positive, default=1, help="devices per process (default: 1)")
  parser.add_argument(
    "--gpus",
    action=argparse.BooleanOptionalAction,
    help="use NVIDIA GPUs instead of simulated CPU devices (default: if the machine has any and JAX_PLATFORMS does not "
    "exclude them)",
  )
  parser.add_argument(
    "--max-restarts",
    type=_natural,
    default=0,
    help="maximum number of restarts after a failure (default: 0)",
  )
  parser.add_argument(
    "--connect-timeout",
    type=float,
    default=300.0,
    help="seconds to wait for all processes to connect (default: 300)",
  )
  parser.add_argument(
    "--hang-timeout",
    type=float,
    default=60.0,
    help="seconds after which a process that does not respond counts as failed (default: 60)",
  )
  parser.add_argument("command", nargs=argparse.REMAINDER, help="--, followed by the command of each process")
  return parser


class _Group:
  """The running processes."""

  def __init__(self, launch: Launch):
    self.launch = launch
    self.asked = False
    """Whether the launcher has received a stop signal."""
    self._children: list[subprocess.Popen[bytes]] = []

  def run(self) -> int:
    """Starts all processes, waits until they exit, and returns the first nonzero exit code, or 0."""
    port, job = _free_port(), secrets.token_hex(8)
    self._children = []
    threads = []
    for index in range(self.launch.processes):
      if self.asked:
        break
      child = subprocess.Popen(
        self.launch.command,
        env=self.launch.environment(index, port, job),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in the terminal reaches it once, through the launcher
        preexec_fn=_end_with_launcher,
      )
      self._children.append(child)
      for stream, out in ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer)):
        assert stream is not None
        threads.append(threading.Thread(target=_copy, args=(index, stream, out), daemon=True))
        threads[-1].start()
    try:
      code = self._wait()
    finally:
      self._kill()
    for thread in threads:
      thread.join(timeout=5.0)
    return code

  def pass_on(self, number: int, frame: object) -> None:
    """The handler of SIGINT and SIGTERM."""
    self.asked = True
    for child in self._children:
      if child.poll() is None:
        child.send_signal(number)

  def _wait(self) -> int:
    """Waits until all processes have exited. After a failure, ends the others after some seconds."""
    first: int | None = None
    failed_at = 0.0
    told = False
    while True:
      running = [child for child in self._children if child.poll() is None]
      # Asked again: a process may have been killed, and another have ended of that, while the others were asked.
      failed = [(i, child.returncode) for i, child in enumerate(self._children) if child.poll()]
      if failed and first is None:
        index, first = min(failed, key=lambda failure: failure[1] >= 0)  # a process that was killed is the cause
        failed_at = time.monotonic()
        if first < 0:
          _say(f"process {index} was killed by {signal.Signals(-first).name}")
      if not running:
        return _exit_code(first or 0)
      # After a stop signal, the processes finish saving, for which they have their own time limit.
      stopped = self.asked or first in STOPPED
      if first is not None and not stopped and time.monotonic() - failed_at > (2 if told else 1) * FAILED_S:
        still = f"{len(running)} of {len(self._children)} processes are still running"
        _say(f"{still}; sending {'SIGKILL' if told else 'SIGTERM'}")
        for child in running:
          child.send_signal(signal.SIGKILL if told else signal.SIGTERM)
        told = True
      time.sleep(0.05)

  def _kill(self) -> None:
    for child in self._children:
      if child.poll() is None:
        child.kill()
        child.wait()


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _end_with_launcher() -> None:
  """Called in a new process: it will receive SIGTERM when the launcher ends, even if the launcher is killed."""
  _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _exit_code(returned: int) -> int:
  """The exit code as reported by a shell."""
  return returned if returned >= 0 else 128 - returned


def _copy(index: int, stream: BinaryIO, out: BinaryIO) -> None:
  """Copies the output of a process, with the index of the process before each line."""
  for line in stream:
    with _WHOLE_LINES:
      out.write(f"[{index}] ".encode() + (line if line.endswith(b"\n") else line + b"\n"))
      out.flush()


_WHOLE_LINES = threading.Lock()


def _say(text: str) -> None:
  print(f"launch: {text}", file=sys.stderr, flush=True)


def _free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def _found(program: str) -> list[str]:
  """Finds a program. `moejax` and `python` are those of the environment of the launcher."""
  if program == "moejax":
    return [sys.executable, "-m", "moejax"]
  if program == "python":
    return [sys.executable]
  if shutil.which(program) is None:
    _parser().error(f"program {program!r} not found")
  return [program]


def _has_gpus() -> bool:
  platforms = os.environ.get("JAX_PLATFORMS", "")
  return os.path.exists("/dev/nvidia0") and (not platforms or "cuda" in platforms or "gpu" in platforms)


def _flags() -> str:
  """XLA_FLAGS without the number of devices, which the launcher sets."""
  flags = os.environ.get("XLA_FLAGS", "").split()
  return " ".join(flag for flag in flags if not flag.startswith("--xla_force_host_platform_device_count"))


def _positive(text: str) -> int:
  return _at_least(1, text)


def _natural(text: str) -> int:
  return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
  if not text.isdigit() or int(text) < least:
    raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
  return int(text)


if __name__ == "__main__":
  sys.exit(main())
