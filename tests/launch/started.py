"""Starts the processes of a program as a launcher does, and ends them whatever happens."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

EXPERIMENTS = pathlib.Path(__file__).with_name("launch_experiments.py")


class Started:
  """A process with its log."""

  def __init__(self, command: list[str], environment: dict[str, str], log: pathlib.Path):
    self.log = log
    self.popen = subprocess.Popen(command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)

  @property
  def output(self) -> str:
    return self.log.read_text()

  def send(self, number: signal.Signals) -> None:
    self.popen.send_signal(number)

  def wait(self, seconds: float = 120.0) -> int:
    """Its exit code."""
    try:
      return self.popen.wait(seconds)
    except subprocess.TimeoutExpired:
      raise AssertionError(f"it did not end within {seconds} s:\n{self.output[-3000:]}") from None


@contextlib.contextmanager
def started(
  count: int, devices: int, command: list[str] | list[list[str]], folder: pathlib.Path, **variables: str
) -> Iterator[list[Started]]:
  """`count` processes that run `command`, or each its own, which find each other through the environment."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  found = []
  try:
    for index in range(count):
      environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "MOEJAX_HANG_TIMEOUT_S": "20",
        **variables,
      }
      own = command[index] if isinstance(command[0], list) else command
      found.append(Started(own, environment, folder / f"process-{index}.log"))
    yield found
  finally:
    for process in found:
      with contextlib.suppress(ProcessLookupError):
        process.popen.kill()
      process.popen.wait()


def moejax(*arguments: str) -> list[str]:
  return [sys.executable, "-m", "moejax", *arguments]


def train(text: pathlib.Path, directory: pathlib.Path, experiment: str = "sparse", *overrides: str) -> list[str]:
  """The command that trains one of the tiny experiments."""
  data = ("--data.train", str(text / "train.txt"), "--data.validation", str(text / "validation.txt"))
  return moejax("train", f"{EXPERIMENTS}:{experiment}", "--workdir", str(directory), *data, *overrides)


def wait_until(happened: Callable[[], bool], processes: list[Started], seconds: float = 120.0) -> None:
  """Until something has happened, as long as the processes run."""
  end = time.monotonic() + seconds
  while not happened():
    logs = "\n".join(process.output[-3000:] for process in processes)
    assert all(process.popen.poll() is None for process in processes), logs
    assert time.monotonic() < end, logs
    time.sleep(0.05)


def steps_done(directory: pathlib.Path) -> int:
  """Training steps of which a line is in metrics.jsonl."""
  path = directory / "metrics.jsonl"
  return sum('"loss"' in line for line in path.read_text().splitlines()) if path.exists() else 0


LAUNCH = [sys.executable, "-m", "moejax.launch.local"]


def read_losses(directory: pathlib.Path) -> list[float]:
  """Of every step, from metrics.jsonl."""
  records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
  return [record["loss"] for record in records if "loss" in record]
