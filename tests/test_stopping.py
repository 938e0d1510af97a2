"""Whole commands that are stopped or killed at random moments, and then run again: the end is as if they never were."""

import importlib.util
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).parent
MINE = HERE / "conftest.py"
TEXT = ["--data.train", "{text}", "--data.validation", str(MINE)]
COMMANDS = {
  "train": [
    "train", f"{MINE}:sparse", "--workdir", "{out}", *TEXT, "--training.steps", "120", "--training.log-every", "1",
    "--evaluation.every", "40", "--training.checkpoints.every", "10", "--mesh.data", "1",
  ],
  "compare": [
    "compare", f"{MINE}:suite", "--workdir", "{out}", *TEXT, "--training.steps", "40",
    "--training.checkpoints.every", "5", "--mesh.data", "1",
  ],
  "data pack": ["data", "pack", "--source", "{text}", "--out", "{out}", "--shard-tokens", "65536"],
  "tokenizer train": ["tokenizer", "train", "--source", "{text}", "--vocab-size", "2000", "--out", "{out}/words.json"],
  "evaluate": ["evaluate", "{out}", "--tasks", "arc_easy", "webqs", "--data", "{tmp}/benchmarks"],
  "plan": ["plan", f"{MINE}:sparse", "--topology", "cpu:8", "--json", "{out}/plan.json"],
}  # fmt: skip
STOPS = {signal.SIGINT: {130}, signal.SIGTERM: {143, 75}}
ENDS_WITHIN_S = 30
TIMED = ("time_s", "per_s", "mfu")
"""Ends of the names of what differs between two runs of the same."""


class Folder:
  """A command's output, in a directory of its own."""

  def __init__(self, command: str, tmp: pathlib.Path, name: str):
    self.command, self.tmp, self.out = command, tmp, tmp / name
    self.out.mkdir()
    if command == "evaluate":
      shutil.copytree(tmp / "trained", self.out, dirs_exist_ok=True)

  def begin(self) -> subprocess.Popen:
    words = [word.format(tmp=self.tmp, text=self.tmp / "text.txt", out=self.out) for word in COMMANDS[self.command]]
    environment = os.environ | {"XDG_CACHE_HOME": str(self.out) + "-cache", "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-m", "moejax", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

  def finish(self) -> float:
    """Runs the command to its end and returns the seconds that it takes."""
    started = time.monotonic()
    process = self.begin()
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return time.monotonic() - started

  def stop(self, chance: random.Random, signals: tuple[signal.Signals, ...], duration_s: float) -> bool:
    """Begins the command and sends it a signal at a random moment; returns whether it was done before."""
    number = chance.choice(signals)
    process = self.begin()
    wait_for_handler(process)
    try:
      process.wait(chance.uniform(0.0, duration_s))
    except subprocess.TimeoutExpired:
      process.send_signal(number)
    said, _ = process.communicate(timeout=ENDS_WITHIN_S)
    assert process.returncode in STOPS.get(number, {-number}) | {0}, said
    assert "Traceback" not in said and "Fatal" not in said and "leaked" not in said, said
    if process.returncode > 0:
      last = said.strip().splitlines()[-1]
      assert last.startswith(f"moejax: stopped by {number.name}"), said
      assert (process.returncode == 75) == (number == signal.SIGTERM and "continues from" in last)
    return process.returncode == 0

  def result(self) -> object:
    """What must not depend on when a command was stopped; step times always differ."""
    out = self.out
    if self.command in ("data pack", "tokenizer train"):
      return {path.name: path.read_bytes() for path in sorted(out.iterdir())}
    if self.command == "plan":
      planned = json.loads((out / "plan.json").read_text())
      return {name: planned[name] for name in ("mesh", "hbm_bytes_per_device", "step_time_s", "collectives")}
    if self.command == "evaluate":
      return json.loads((out / "results.json").read_text())["results"]
    return [result_of_run(run) for run in ([out] if self.command == "train" else sorted((out / "runs").iterdir()))]


def result_of_run(run: pathlib.Path) -> list:
  """Metrics, scores and the checksums of the last parameters."""
  records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  summary = json.loads((run / "summary.json").read_text())
  last = json.loads((run / "checkpoints" / str(summary["steps"]) / "progress" / "metadata").read_text())
  return [
    [{key: x for key, x in record.items() if not key.endswith(TIMED)} for record in records],
    {key: x for key, x in summary.items() if key.startswith("held_out/")},
    last["arrays"],
  ]


def wait_for_handler(process: subprocess.Popen) -> None:
  """Returns when SIGTERM is blocked or has a handler: in its first moments a Python process has the system's own."""
  bit = 1 << (signal.SIGTERM - 1)
  while process.poll() is None:
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigBlk", "SigCgt"))]
    if any(mask & bit for mask in masks):
      return
    time.sleep(0.01)


def prepare(command: str, tmp: pathlib.Path) -> None:
  """Writes what a command reads."""
  (tmp / "text.txt").write_text("".join(f"Sentence {i} of a text.\n" for i in range(20_000)))
  if command == "evaluate":
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    found = importlib.util.spec_from_file_location("harness_fixtures", HERE / "evaluation" / "harness_fixtures.py")
    assert found and found.loader
    fixtures = importlib.util.module_from_spec(found)
    found.loader.exec_module(fixtures)
    fixtures.write_benchmarks(tmp / "benchmarks")
    words = [word.format(text=tmp / "text.txt") for word in TEXT]
    run = ["train", f"{MINE}:sparse", "--workdir", str(tmp / "trained"), *words, "--training.steps", "2"]
    subprocess.run([sys.executable, "-m", "moejax", *run, "--data.sequence-length", "256"], check=True)


def end_as_if_never(
  command: str, tmp: pathlib.Path, tries: int, signals: tuple[signal.Signals, ...], seed: int
) -> None:
  chance = random.Random(f"{command} {seed}")
  prepare(command, tmp)
  straight, stopped = Folder(command, tmp, "straight"), Folder(command, tmp, "stopped")
  duration_s = straight.finish()
  if command == "compare":  # step times decide how long each member is trained
    shutil.copy(straight.out / "measurements.json", stopped.out)
  for _ in range(tries):
    if stopped.stop(chance, signals, duration_s):
      break
  stopped.finish()
  assert stopped.result() == straight.result()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "data pack"])
def test_a_command_that_is_stopped_or_killed_at_random_moments_ends_as_if_it_never_was(command, tmp_path):
  end_as_if_never(command, tmp_path, 2, (*STOPS, signal.SIGKILL), 0)


@pytest.mark.nightly
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_stopped_eight_times_ends_soon_and_then_as_if_it_never_was(command, tmp_path):
  end_as_if_never(command, tmp_path, 8, (*STOPS,), 1)


KILLS = {"train": 8, "compare": 5, "evaluate": 3, "data pack": 2, "tokenizer train": 2}
"""Twenty in all."""


@pytest.mark.nightly
@pytest.mark.parametrize("command", KILLS)
def test_a_command_that_is_killed_again_and_again_ends_as_if_it_never_was(command, tmp_path):
  end_as_if_never(command, tmp_path, KILLS[command], (signal.SIGKILL,), 2)
