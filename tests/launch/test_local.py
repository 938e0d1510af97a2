"""The launcher of several processes on this machine: what it starts, passes on and returns."""

import json
import pathlib
import re
import signal
import subprocess
import time

import numpy as np
import pytest
from jax._src import distributed
from started import LAUNCH, read_losses, train

SHOW = "import os; print(*(os.environ[n] for n in ('JAX_PROCESS_ID', 'JAX_NUM_PROCESSES', 'XLA_FLAGS')))"


def launch(*options: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
  return subprocess.run([*LAUNCH, *options], capture_output=True, text=True, timeout=timeout_s, check=False)


def test_each_process_has_its_number_and_devices_and_each_line_begins_with_it():
  done = launch("--processes", "3", "--devices-per-process", "2", "--", "python", "-c", SHOW)
  assert done.returncode == 0, done.stderr
  lines = sorted(done.stdout.splitlines())
  assert [line[:8] for line in lines] == [f"[{index}] {index} 3 " for index in range(3)]
  assert all(line.endswith("--xla_force_host_platform_device_count=2") for line in lines)


def test_each_process_has_its_gpus_and_no_simulated_devices(monkeypatch):
  """What JAX reads: `jax.distributed.initialize` takes the GPUs of a process from JAX_LOCAL_DEVICE_IDS."""
  for name in ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_LOCAL_DEVICE_IDS"):
    monkeypatch.delenv(name, raising=False)
  code = (
    "import os; print(os.environ['JAX_LOCAL_DEVICE_IDS'], {'JAX_PLATFORMS', 'XLA_FLAGS'} & {*os.environ}, "
    "os.environ['JAX_PROCESS_ID'])"
  )
  done = launch("--gpus", "--processes", "3", "--devices-per-process", "2", "--", "python", "-c", code)
  assert sorted(done.stdout.splitlines()) == [f"[{i}] {2 * i},{2 * i + 1} set() {i}" for i in range(3)]
  # A process that has one GPU of its own.
  done = launch("--gpus", "--processes", "2", "--", "python", "-c", code)
  assert sorted(done.stdout.splitlines()) == ["[0] 0 set() 0", "[1] 1 set() 1"]
  source = pathlib.Path(distributed.__file__).read_text()
  assert "os.environ.get('JAX_LOCAL_DEVICE_IDS')" in source


def test_only_the_loopback_interface_is_used():
  code = "import os; print(os.environ['JAX_COORDINATOR_ADDRESS'], os.environ['JAX_COORDINATOR_BIND_ADDRESS'])"
  (line,) = launch("--processes", "1", "--", "python", "-c", code).stdout.splitlines()
  assert re.fullmatch(r"\[0\] 127\.0\.0\.1:(\d+) 127\.0\.0\.1:\1", line)


@pytest.mark.slow
def test_a_failure_ends_all_and_its_exit_code_is_returned():
  code = "import os, sys, time; sys.exit(7) if os.environ['JAX_PROCESS_ID'] == '1' else time.sleep(60)"
  begin = time.monotonic()
  assert launch("--processes", "2", "--", "python", "-c", code).returncode == 7
  assert time.monotonic() - begin < 40


def test_a_killed_process_is_named():
  code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL) if os.environ['JAX_PROCESS_ID'] == '1' else None"
  done = launch("--processes", "2", "--", "python", "-c", code)
  assert done.returncode == 128 + 9 and "process 1 was killed by SIGKILL" in done.stderr


@pytest.mark.parametrize(("restarts", "code", "starts"), [(0, 5, 1), (1, 5, 2), (2, 0, 3), (5, 0, 3)])
def test_a_failed_program_is_started_again_as_often_as_allowed(tmp_path, restarts, code, starts):
  log = tmp_path / "starts"
  log.touch()
  program = (
    "import os, pathlib, sys\n"
    f"path = pathlib.Path({str(log)!r})\n"
    "if os.environ['JAX_PROCESS_ID'] == '0':\n"
    "  with path.open('a') as file: file.write('x')\n"
    "  sys.exit(0 if len(path.read_text()) == 3 else 5)"
  )
  done = launch("--processes", "2", "--max-restarts", str(restarts), "--", "python", "-c", program)
  assert done.returncode == code and len(log.read_text()) == starts, done.stderr


def test_a_users_mistake_is_not_tried_again():
  done = launch("--processes", "2", "--max-restarts", "3", "--", "python", "-c", "import sys; sys.exit(2)")
  assert done.returncode == 2 and "restarting" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_to_all(number):
  code = (
    "import os, signal, sys, time\n"
    "def handler(number, frame): os.write(1, f'got {number}\\n'.encode()); sys.exit(128 + number)\n"  # reentrant
    f"signal.signal({int(number)}, handler)\nprint('ready', flush=True)\ntime.sleep(60)"
  )
  command = [*LAUNCH, "--processes", "2", "--max-restarts", "2", "--", "python", "-c", code]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout
    ready = {process.stdout.readline().strip() for _ in range(2)}
    assert ready == {"[0] ready", "[1] ready"}
    process.send_signal(number)
    rest = process.stdout.read()
  assert sorted(rest.splitlines()) == [f"[0] got {int(number)}", f"[1] got {int(number)}"]
  assert process.returncode == 128 + number


def test_processes_end_with_a_launcher_that_is_killed(tmp_path):
  code = f"import os, time; open(f'{tmp_path}/{{os.getpid()}}.pid', 'w').close(); time.sleep(60)"
  command = [*LAUNCH, "--processes", "2", "--", "python", "-c", code]
  with subprocess.Popen(command, stdout=subprocess.DEVNULL) as launcher:
    deadline = time.monotonic() + 60
    while len(started := [*tmp_path.glob("*.pid")]) < 2 and time.monotonic() < deadline:
      time.sleep(0.02)
    launcher.kill()
  while any(pathlib.Path("/proc", path.stem).exists() for path in started):
    assert len(started) == 2 and time.monotonic() < deadline
    time.sleep(0.02)


@pytest.mark.parametrize(
  ("options", "text"),
  [
    (["--processes", "0", "--", "true"], "'0' is not an integer of at least 1"),
    (["--processes", "2", "--max-restarts", "-1", "--", "true"], "is not an integer of at least 0"),
    (["--processes", "2"], "give the command after --"),
    (["--processes", "2", "--", "no-such-program"], "program 'no-such-program' not found"),
  ],
)
def test_a_mistake_is_one_line(options, text):
  done = launch(*options)
  assert done.returncode == 2 and text in done.stderr.splitlines()[-1] and not done.stdout


def parameters(directory: pathlib.Path) -> dict[str, str]:
  """The checksums of the newest checkpoint's arrays."""
  steps = [path for path in (directory / "checkpoints").iterdir() if path.name.isdigit()]
  newest = max(steps, key=lambda path: int(path.name))
  return json.loads((newest / "progress" / "metadata").read_text())["arrays"]


@pytest.mark.nightly
def test_a_program_whose_process_is_killed_restarts_and_ends_as_if_nothing_had_happened(text, tmp_path):
  straight, killed = tmp_path / "straight", tmp_path / "killed"
  options = ("--processes", "2", "--devices-per-process", "2", "--max-restarts", "1", "--")
  steps = ("--training.steps", "12")
  done = launch(*options, *train(text, straight, "sparse", *steps), timeout_s=400)
  assert done.returncode == 0, done.stderr[-3000:]
  command = [*LAUNCH, *options, *train(text, killed, "sparse", *steps)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
    assert process.stdout
    log, victim = "", None
    for line in process.stdout:
      log += line
      if victim is None and re.search(r"train sparse ([1-9]|10)/12 ", line):
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        victim = int(found.stdout.split()[1])
        subprocess.run(["kill", "-9", str(victim)], check=True)
  assert process.returncode == 0 and victim is not None and "was killed by SIGKILL" in log, log[-3000:]
  assert parameters(killed) == parameters(straight)
  np.testing.assert_array_equal(read_losses(killed), read_losses(straight))
