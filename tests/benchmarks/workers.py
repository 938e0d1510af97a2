"""Processes that take turns at the same work, so that whatever else the machine does hits all alike.

A worker is a process that prints `READY {json}` and then, for each line `N` on its standard input, runs N steps and
prints `T t1 t2 ...` in seconds; `q` ends it. What counts is the median over rounds of the ratio within a round.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping


def take_turns(specs: Mapping[str, dict], rounds: int, steps: int, folder: pathlib.Path | None = None) -> dict:
  """Starts all workers, lets them take turns, and returns the median seconds of each worker's turns.

  Args:
    specs: by name, {"cmd": [...], "env": {...}, "cwd": "..."}; env and cwd may be left out.
    rounds: turns of each worker.
    steps: steps in a turn, of which the median counts.
    folder: where commands without a cwd run.
  """
  workers = {name: start(name, spec, folder) for name, spec in specs.items()}
  turns: dict[str, list[float]] = {name: [] for name in workers}
  for turn in range(rounds):
    for name, worker in workers.items():
      turns[name].append(statistics.median(run(worker, steps)))
    print(f"round {turn + 1} of {rounds}", file=sys.stderr)
  for worker in workers.values():
    worker.communicate("q\n")
  return turns


def ratio(times_s: list[float], others_s: list[float]) -> float:
  """Median over rounds of the ratio within a round."""
  return statistics.median(a / b for a, b in zip(times_s, others_s, strict=True))


def start(name: str, spec: dict, folder: pathlib.Path | None) -> subprocess.Popen:
  # Every JAX worker gets what the program gives itself: huge pages, without which page faults take a third of a step.
  environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ, **spec.get("env", {})}
  begin = time.perf_counter()
  worker = subprocess.Popen(
    spec["cmd"], env=environment, cwd=spec.get("cwd", folder), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
  )
  assert worker.stdout
  line = worker.stdout.readline()
  if not line.startswith("READY "):
    raise SystemExit(f"worker {name} did not start; run {' '.join(spec['cmd'])} to see why")
  print(f"{name} ready in {time.perf_counter() - begin:.1f} s: {line[6:].strip()}", file=sys.stderr)
  return worker


def run(worker: subprocess.Popen, steps: int) -> list[float]:
  assert worker.stdin and worker.stdout
  worker.stdin.write(f"{steps}\n")
  worker.stdin.flush()
  return [float(value) for value in worker.stdout.readline().split()[1:]]


def serve(step: Callable[[], None], facts: dict) -> None:
  """The worker's side of the protocol; whatever libraries print goes to standard error."""
  for _ in range(3):
    step()
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  answers.write(f"READY {json.dumps(facts)}\n")
  for line in sys.stdin:
    if line.strip() == "q":
      break
    times_s = []
    for _ in range(int(line)):
      begin = time.perf_counter()
      step()
      times_s.append(time.perf_counter() - begin)
    answers.write("T " + " ".join(f"{value:.6f}" for value in times_s) + "\n")
