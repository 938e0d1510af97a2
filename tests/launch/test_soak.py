"""A long run of two processes with a fault at random moments, of which the end is that of a run without faults.

MOEJAX_SOAK_MINUTES sets how long there are faults (default: 30). The run has as many steps as it has trained by then.
"""

import contextlib
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from started import LAUNCH, read_losses, steps_done, train

MINUTES = float(os.environ.get("MOEJAX_SOAK_MINUTES", "30"))
EVERY_S = 60.0 if MINUTES >= 10 else 20.0
"""Seconds between two faults."""
ENDS_WITHIN_S = 120.0
HANG_S = 10.0
ENDLESS = 10**6
"""Steps of the run as long as there are faults. Its schedule is constant, so that its length can be set later."""


class Job:
  """The command, started again whenever it has ended before its run is trained."""

  def __init__(self, text: pathlib.Path, directory: pathlib.Path, steps: int):
    self.text, self.steps = text, steps
    self.directory, self.log = directory, directory.with_suffix(".log")
    self.starts, self.codes = 0, list[int]()
    self.start()

  def start(self) -> None:
    options = ("--processes", "2", "--devices-per-process", "2", "--max-restarts", "1", "--hang-timeout", str(HANG_S))
    often = ("--training.checkpoints.every", "10", "--evaluation.every", "250", "--training.steps", str(self.steps))
    command = [*LAUNCH, *options, "--", *train(self.text, self.directory, "sparse", *often)]
    self.starts += 1
    with self.log.open("a") as log:
      self.launcher = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

  def is_running(self) -> bool:
    return self.launcher.poll() is None

  def is_done(self) -> bool:
    return self.launcher.poll() == 0

  def processes(self) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(self.launcher.pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]

  def wait(self) -> None:
    """Until the launcher has ended."""
    try:
      self.codes.append(self.launcher.wait(ENDS_WITHIN_S))
    except subprocess.TimeoutExpired:
      raise AssertionError(f"it did not end within {ENDS_WITHIN_S} s:\n{self.output[-5000:]}") from None

  def kill(self) -> None:
    """Ends the launcher and all processes at once, as the loss of a host does."""
    for pid in (self.launcher.pid, *self.processes()):
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    self.wait()

  @property
  def output(self) -> str:
    return self.log.read_text()

  def checkpoints(self) -> list[pathlib.Path]:
    """Whole ones, the newest last."""
    folders = self.directory / "checkpoints"
    found = [path for path in folders.iterdir() if path.name.isdigit()] if folders.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def kill_a_process(job: Job, chance: random.Random) -> None:
  """The launcher starts all again."""
  with contextlib.suppress(ProcessLookupError):
    os.kill(chance.choice(job.processes()), signal.SIGKILL)


def stop_a_process(job: Job, chance: random.Random) -> None:
  """It hangs, which the other one notices."""
  with contextlib.suppress(ProcessLookupError):
    os.kill(chance.choice(job.processes()), signal.SIGSTOP)


def lose_the_host(job: Job, chance: random.Random) -> None:
  """Its lock is left behind."""
  job.kill()


def preempt(job: Job, chance: random.Random) -> None:
  os.kill(job.launcher.pid, signal.SIGTERM)
  job.wait()
  assert job.codes[-1] in (0, 75, 143), job.output[-5000:]


def damage_the_newest_checkpoint(job: Job, chance: random.Random) -> None:
  job.kill()
  if len(job.checkpoints()) > 1:  # if it is the only one, there is nothing to resume from
    files = sorted(path for path in job.checkpoints()[-1].rglob("*") if path.is_file() and path.stat().st_size)
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def fill_the_disk(job: Job, chance: random.Random) -> None:
  """No file may grow for some seconds; checkpoints are saved several times in them."""
  pids = job.processes()
  for limit in (512, resource.RLIM_INFINITY):
    for pid in pids:
      with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if limit == 512:
      time.sleep(5)


def write_garbage_to_metrics(job: Job, chance: random.Random) -> None:
  job.kill()
  path = job.directory / "metrics.jsonl"
  if path.exists():
    with path.open("ab") as file:
      file.write(b'{"step": 7, "lo\n\x80\x00[1, 2]\nnull\n{"step": "x", "loss": 1}\n')


def leave_a_half_checkpoint(job: Job, chance: random.Random) -> None:
  """As one that was being written when its host was lost."""
  job.kill()
  if job.checkpoints():
    half = job.directory / "checkpoints" / f"{int(job.checkpoints()[-1].name) + 50}.orbax-checkpoint-tmp-7"
    (half / "state").mkdir(parents=True)
    (half / "state" / "manifest.ocdbt").write_bytes(chance.randbytes(100))


FAULTS: tuple[Callable[[Job, random.Random], None], ...] = (
  kill_a_process, stop_a_process, lose_the_host, preempt, damage_the_newest_checkpoint, fill_the_disk,
  write_garbage_to_metrics, leave_a_half_checkpoint,
)  # fmt: skip


@contextlib.contextmanager
def begun(text: pathlib.Path, directory: pathlib.Path, steps: int) -> Iterator[Job]:
  job = Job(text, directory, steps)
  try:
    yield job
  finally:
    if job.is_running():
      job.kill()


def run_to_the_end(job: Job) -> None:
  tries = 0
  while not job.is_done():
    if not job.is_running():
      tries += 1
      assert tries < 10, job.output[-5000:]
      job.start()
    time.sleep(0.2)


def inject(job: Job) -> list[str]:
  """Faults at random moments, all kinds of them before one comes again, until the time is up."""
  chance, order, injected = random.Random(0), list[Callable[[Job, random.Random], None]](), list[str]()
  end = time.monotonic() + 60 * MINUTES
  while time.monotonic() < end:
    time.sleep(chance.uniform(0.5, 1.5) * EVERY_S)
    if job.is_running() and len(job.processes()) == 2:
      order = order or chance.sample(FAULTS, len(FAULTS))
      fault = order.pop()
      injected.append(f"{fault.__name__} at step {steps_done(job.directory)}")
      fault(job, chance)
    if not job.is_running():
      job.start()
  return injected


def set_length(job: Job) -> int:
  """Stops the job, and starts it with some more steps than it has trained. Returns their number."""
  job.kill()
  job.steps = 20 + max((int(path.name) for path in job.checkpoints()), default=0)
  job.start()
  return job.steps


def parameters(directory: pathlib.Path, steps: int) -> dict[str, str]:
  return json.loads((directory / "checkpoints" / str(steps) / "progress" / "metadata").read_text())["arrays"]


@pytest.mark.nightly
def test_a_run_with_a_fault_each_minute_ends_as_one_without(text, tmp_path):
  with begun(text, tmp_path / "faulted", ENDLESS) as faulted:
    injected = inject(faulted)
    steps = set_length(faulted)
    run_to_the_end(faulted)
  print(f"{steps} steps, {faulted.starts} starts, exit codes {faulted.codes}:", *injected, sep="\n")
  with begun(text, tmp_path / "straight", steps) as straight:
    run_to_the_end(straight)
  assert len(injected) >= 60 * MINUTES / EVERY_S / 4
  assert "Traceback" not in faulted.output, faulted.output
  assert parameters(faulted.directory, steps) == parameters(straight.directory, steps)
  np.testing.assert_array_equal(read_losses(faulted.directory), read_losses(straight.directory))
  with np.load(faulted.directory / "held_out.npz") as mine, np.load(straight.directory / "held_out.npz") as other:
    np.testing.assert_array_equal(mine["nats"], other["nats"])
