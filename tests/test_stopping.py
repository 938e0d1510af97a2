"""Whole commands that are stopped at random moments: how they end, and that the same command then ends as if never."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

MINE = pathlib.Path(__file__).parent / "conftest.py"
TEXT = ["--data.train", "{text}", "--data.validation", str(MINE)]
COMMANDS = {
  "train": [
    "train", f"{MINE}:sparse", "--workdir", "{tmp}/out", *TEXT, "--training.steps", "300", "--training.log-every", "1",
    "--evaluation.every", "100", "--training.checkpoints.every", "100", "--mesh.data", "1",
  ],
  "compare": [
    "compare", f"{MINE}:suite", "--workdir", "{tmp}/out", *TEXT, "--training.steps", "20", "--mesh.data", "1",
  ],
  "data pack": ["data", "pack", "--source", "{text}", "--out", "{tmp}/out", "--shard-tokens", "65536"],
  "plan": ["plan", f"{MINE}:sparse", "--topology", "cpu:8", "--json", "{tmp}/out.json"],
}  # fmt: skip
TRIES = 4
ENDS_WITHIN_S = 30
CODES = {signal.SIGINT: {130}, signal.SIGTERM: {143, 75}, signal.SIGKILL: {-signal.SIGKILL}}


def begin(command: str, folder: pathlib.Path) -> subprocess.Popen:
  words = [word.format(tmp=folder, text=folder.parent / "text.txt") for word in COMMANDS[command]]
  environment = os.environ | {"XDG_CACHE_HOME": str(folder), "PYTHONFAULTHANDLER": "1"}
  command_line = [sys.executable, "-m", "moejax", *words]
  return subprocess.Popen(command_line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(command: str, folder: pathlib.Path) -> float:
  """Runs a command to its end and returns the seconds that it takes."""
  started = time.monotonic()
  process = begin(command, folder)
  said, _ = process.communicate()
  assert process.returncode == 0, said
  return time.monotonic() - started


def wait_for_handler(process: subprocess.Popen) -> None:
  """Returns when SIGTERM is blocked or has a handler: in its first moments a Python process has the system's own."""
  bit = 1 << (signal.SIGTERM - 1)
  while process.poll() is None:
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigBlk", "SigCgt"))]
    if any(mask & bit for mask in masks):
      return
    time.sleep(0.01)


def result(command: str, folder: pathlib.Path) -> object:
  """What must not depend on when a command was stopped; step times always differ."""
  out = folder / "out"
  if command == "data pack":
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}
  if command == "plan":
    planned = json.loads((folder / "out.json").read_text())
    return {name: planned[name] for name in ("mesh", "hbm_bytes_per_device", "step_time_s", "collectives")}
  runs = [out] if command == "train" else sorted(path for path in (out / "runs").iterdir() if path.name == "dense")
  kept = []
  for run in runs:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record["step"] for record in records if "loss" in record]
    assert trained == sorted(set(trained))
    timed = ("time_s", "per_s", "mfu")
    kept.append([{key: x for key, x in record.items() if not key.endswith(timed)} for record in records])
    summary = json.loads((run / "summary.json").read_text())
    kept.append([{key: x for key, x in summary.items() if key.startswith("held_out/")}])
  return kept


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_stopped_at_random_moments_ends_soon_and_then_as_if_it_never_was(command, tmp_path):
  chance = random.Random(command)
  folders = [tmp_path / name for name in ("straight", "stopped")]
  for folder in folders:
    folder.mkdir()
  (tmp_path / "text.txt").write_text("".join(f"Sentence {i} of a text.\n" for i in range(20_000)))
  duration_s = finish(command, folders[0])
  for _ in range(TRIES):
    number = chance.choice(list(CODES))
    process = begin(command, folders[1])
    wait_for_handler(process)
    try:
      process.wait(chance.uniform(0.0, duration_s))
      break  # it is done
    except subprocess.TimeoutExpired:
      process.send_signal(number)
    said, _ = process.communicate(timeout=ENDS_WITHIN_S)
    assert process.returncode in CODES[number] | {0}, said
    assert "Traceback" not in said and "Fatal" not in said and "leaked" not in said, said
    if process.returncode > 0:
      last = said.strip().splitlines()[-1]
      assert last.startswith(f"moejax: stopped by {number.name}"), said
      assert (process.returncode == 75) == (number == signal.SIGTERM and "continues from" in last)
  finish(command, folders[1])
  assert result(command, folders[1]) == result(command, folders[0])
