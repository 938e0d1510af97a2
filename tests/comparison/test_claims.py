"""Several jobs run one comparison in one directory: who trains what, and that the result is that of one job."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_run import TESTS_OWN, tiny_suite

from moejax.comparison import claims
from moejax.comparison.claims import train_unclaimed
from moejax.config.plain import to_plain
from moejax.lock import LOCK, holder, locked

TIMES = ("step_time_s", "step_time_interval_s", "train_time_s", "tokens_per_s", "mfu", "compile_time_s")
"""Of a member, what no two runs have in common."""


def test_what_another_job_trains_is_left_to_it_and_waited_for(tmp_path, monkeypatch):
  done, trained, notes = set[str](), [], []
  other = locked(tmp_path / "b", "train b", notes.append)
  other.__enter__()

  def finish(seconds: float) -> None:
    """The other job finishes its member while this one waits."""
    assert trained == ["a", "c"]
    done.add("b")
    other.__exit__(None, None, None)

  monkeypatch.setattr(claims.time, "sleep", finish)

  def train(name: str) -> None:
    assert holder(tmp_path / name / LOCK)
    trained.append(name)
    done.add(name)

  assert train_unclaimed("abc", tmp_path, done.__contains__, train, notes.append)
  assert trained == ["a", "c"] and done == {*"abc"}
  (note,) = notes
  assert note.startswith(f"b is trained by `train b` (host {os.uname().nodename}, pid {os.getpid()}, started ")


def test_a_member_that_another_job_gives_up_is_trained(tmp_path, monkeypatch):
  done, notes = set[str](), []
  other = locked(tmp_path / "b", "train b", notes.append)
  other.__enter__()
  monkeypatch.setattr(claims.time, "sleep", lambda seconds: other.__exit__(None, None, None))
  assert train_unclaimed("ab", tmp_path, done.__contains__, done.add, notes.append)
  assert done == {*"ab"}


def test_a_member_that_another_job_finishes_just_before_it_is_claimed_is_not_trained_again(tmp_path, monkeypatch):
  done = set[str]()

  @contextlib.contextmanager
  def claimed(directory, what, note):
    done.add(directory.name)
    yield None

  monkeypatch.setattr(claims, "claimed", claimed)
  assert not train_unclaimed("a", tmp_path, done.__contains__, pytest.fail, pytest.fail)


def test_one_job_alone_trains_each_member_once_in_order(tmp_path):
  trained: list[str] = []
  assert not train_unclaimed("abc", tmp_path, trained.__contains__, trained.append, pytest.fail)
  assert trained == [*"abc"]
  assert not train_unclaimed("abc", tmp_path, trained.__contains__, pytest.fail, pytest.fail)


def start(suite: pathlib.Path, directory: pathlib.Path, log: pathlib.Path) -> subprocess.Popen:
  environment = {name: value for name, value in os.environ.items() if name not in TESTS_OWN[:2]}
  command = [sys.executable, "-m", "moejax", "compare", str(suite), "--workdir", str(directory)]
  with log.open("w") as out:
    return subprocess.Popen(command, stdout=out, stderr=out, env=environment)


@pytest.mark.nightly
def test_three_jobs_of_which_one_is_killed_give_the_report_of_one(tmp_path):
  (tmp_path / "text").mkdir()
  for i in range(40):
    (tmp_path / "text" / f"{i:02d}.txt").write_text(f"chapter {i}\n" + "it was the best of times; " * 40)
  of_text = tiny_suite(tmp_path / "text")
  (pair,) = of_text.pairs
  longer = dataclasses.replace(pair.dense, training=dataclasses.replace(pair.dense.training, steps=600))
  suite = dataclasses.replace(of_text, pairs=(dataclasses.replace(pair, dense=longer),))
  (tmp_path / "suite.json").write_text(json.dumps(to_plain(suite)))
  shared, logs = tmp_path / "shared", [tmp_path / f"{i}.log" for i in range(3)]
  jobs = [start(tmp_path / "suite.json", shared, log) for log in logs]
  try:
    killed = _kill_one_that_trains(shared, jobs)
    codes = [job.wait(600) for job in jobs]
  finally:
    for job in jobs:
      job.kill()
  said = [log.read_text() for log in logs]
  assert sorted(codes) == [-signal.SIGKILL, 0, 0], said
  survivors = "\n".join(text for text, code in zip(said, codes, strict=True) if code == 0)
  assert f"took over the lock of `train {killed}`" in survivors
  assert sum(f"report: {shared}" in text for text in said) == 1
  assert sum("measure step times, members in turn" in text for text in said) == 1
  assert (
    sum(any(f"train {name}" in line.split("`")[0] for line in text.splitlines() for name in RUNS) for text in said) > 1
  )

  alone = tmp_path / "alone"
  alone.mkdir()
  shutil.copy(shared / "measurements.json", alone)  # step times decide how long each member is trained
  assert start(tmp_path / "suite.json", alone, tmp_path / "alone.log").wait(600) == 0
  expected, found = (json.loads((folder / "comparison.json").read_text()) for folder in (alone, shared))
  assert found["complete"] and untimed(found) == untimed(expected)
  assert (shared / "report" / "index.html").exists() and not list(shared.rglob(LOCK))


RUNS = ("dense", "moe_4e", "moe_8e")


def _kill_one_that_trains(shared: pathlib.Path, jobs: list[subprocess.Popen]) -> str:
  """Kills the job of the first member that has trained some steps; returns the member's name."""
  deadline = time.monotonic() + 600
  while time.monotonic() < deadline:
    for name in RUNS:
      metrics, there = shared / "runs" / name / "metrics.jsonl", holder(shared / "runs" / name / LOCK)
      if there and metrics.exists() and metrics.read_text().count("\n") >= 3:
        os.kill(there.pid, signal.SIGKILL)
        return name
    assert all(job.poll() is None for job in jobs)
    time.sleep(0.02)
  raise AssertionError("no member was trained")


def untimed(comparison: dict) -> dict:
  """What two runs of a comparison have in common."""
  members = [
    {k: v for k, v in member.items() if k not in TIMES and not k.startswith("goodput/")}
    for member in comparison["members"]
  ]
  return {**comparison, "members": members, "pairs": None, "finding": None, "provenance": None}
