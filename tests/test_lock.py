"""One process at a time in a directory: who is refused, and what a process that was killed leaves."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from moejax import lock
from moejax.errors import UserError
from moejax.lock import LOCK, POLL_S, STALE_S, WRITTEN_S, InUse, holder, locked

HOLD = """
import pathlib, sys, time
from moejax.lock import locked
with locked(pathlib.Path(sys.argv[1]), "train dense", print):
  print("held", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
  """Another process that holds the directory."""
  process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
  assert process.stdout and process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def refuse_notes(text: str) -> None:
  pytest.fail(f"nothing is taken over, and it says: {text}")


def left_by(path, host: str, pid: int, age_s: float) -> None:
  path.write_text(json.dumps({"host": host, "pid": pid, "started": time.time() - age_s, "what": "train dense"}))
  os.utime(path, (time.time() - age_s,) * 2)


def test_a_directory_is_held_until_the_end_and_the_file_says_by_whom(tmp_path):
  with locked(tmp_path / "new", "train dense", refuse_notes):
    there = holder(tmp_path / "new" / LOCK)
    assert there and (there.host, there.pid, there.what) == (socket.gethostname(), os.getpid(), "train dense")
    assert 0 <= time.time() - there.started < 60
  assert list((tmp_path / "new").iterdir()) == []
  with pytest.raises(ZeroDivisionError), locked(tmp_path / "new", "train dense", refuse_notes):
    raise ZeroDivisionError
  assert list((tmp_path / "new").iterdir()) == []


def test_another_process_is_refused_with_one_line_that_names_the_holder(tmp_path, other):
  with pytest.raises(InUse) as caught, locked(tmp_path, "evaluate dense", refuse_notes):
    pytest.fail("two hold it")
  line = str(caught.value)
  assert line.startswith(
    f"{tmp_path} is in use by `train dense` (host {socket.gethostname()}, pid {other.pid}, started "
  )
  assert " s ago); wait for it, stop it, or choose another directory" in line and "\n" not in line
  other.send_signal(signal.SIGCONT)
  assert other.poll() is None and holder(tmp_path / LOCK)


def test_the_lock_of_a_killed_process_is_taken_over_and_it_is_said(tmp_path, other):
  other.kill()
  other.wait()
  notes: list[str] = []
  with locked(tmp_path, "train dense", notes.append):
    there = holder(tmp_path / LOCK)
    assert there and there.pid == os.getpid()
  assert notes == [notes[0]] and f"pid {other.pid}" in notes[0] and "no longer running" in notes[0]
  assert list(tmp_path.iterdir()) == []


def test_a_lock_of_this_host_is_stale_without_its_process_even_if_the_file_system_has_no_flock(tmp_path, monkeypatch):
  def no_locks(descriptor: int, operation: int) -> None:
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr("fcntl.flock", no_locks)
  left_by(tmp_path / LOCK, socket.gethostname(), os.getpid(), 5)
  with pytest.raises(UserError, match="in use"), locked(tmp_path, "train", refuse_notes):
    pytest.fail("two hold it")
  # The same number of a process that began long after the lock was written is another process.
  left_by(tmp_path / LOCK, socket.gethostname(), os.getpid(), 1e6)
  notes: list[str] = []
  with locked(tmp_path, "train", notes.append):
    assert notes


def test_a_lock_of_another_host_is_stale_only_when_it_was_not_touched_for_long(tmp_path):
  left_by(tmp_path / LOCK, "elsewhere", 1, STALE_S - 60)
  with pytest.raises(UserError, match=rf"host elsewhere, pid 1, .*delete {tmp_path}/lock"):
    locked(tmp_path, "train", refuse_notes).__enter__()
  left_by(tmp_path / LOCK, "elsewhere", 1, STALE_S + 60)
  notes: list[str] = []
  with locked(tmp_path, "train", notes.append):
    assert notes and "took over the lock of `train dense` (host elsewhere, pid 1, started 6 min ago)" in notes[0]


@pytest.mark.parametrize("error_s", [-10 * STALE_S, 10 * STALE_S])
def test_a_lock_of_another_host_is_held_however_wrong_the_clock_of_this_host_is(tmp_path, monkeypatch, error_s):
  left_by(tmp_path / LOCK, "elsewhere", 1, 5)
  right = time.time
  monkeypatch.setattr("moejax.lock.time.time", lambda: right() + error_s)
  with pytest.raises(InUse, match=r"host elsewhere, pid 1, started (0 s|50 min) ago"):
    locked(tmp_path, "train", refuse_notes).__enter__()
  os.utime(tmp_path / LOCK, (right() - STALE_S - 60,) * 2)
  notes: list[str] = []
  with locked(tmp_path, "train", notes.append):
    assert len(notes) == 1


def test_the_age_of_a_process_is_that_since_its_start():
  with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as new:
    old_s, new_s = lock._process_age_s(os.getpid()), lock._process_age_s(new.pid)
    assert old_s is not None and new_s is not None and -1 < new_s < 60 and old_s > new_s
  assert lock._process_age_s(new.pid) is None


def test_an_empty_or_damaged_lock_of_nobody_is_no_obstacle(tmp_path):
  for content in ("", "{", "[]", "{}", json.dumps({"host": "a", "pid": "b", "started": None, "what": 3}), "3", "null"):
    (tmp_path / LOCK).write_text(content)
    os.utime(tmp_path / LOCK, (time.time() - WRITTEN_S,) * 2)  # whoever created it was killed before it wrote it
    with locked(tmp_path, "train", refuse_notes):
      assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid(), content
    assert not (tmp_path / LOCK).exists()


def test_who_waits_says_for_whom_once_and_holds_it_when_it_is_released(tmp_path, other):
  notes: list[str] = []
  threading.Timer(2 * POLL_S, other.kill).start()
  with locked(tmp_path, "compare", notes.append, wait=True):
    assert holder(tmp_path / LOCK) and other.wait() == -signal.SIGKILL
  waiting, taken = notes
  assert waiting.startswith("waiting for `train dense`") and f"pid {other.pid}" in waiting
  assert taken.startswith("took over the lock of `train dense`")


CONTEND = """
import pathlib, sys, time
from moejax import lock
lock.STALE_S = 5.0  # longer than a busy machine delays the thread that touches the lock
if sys.argv[2] == "no flock":
  def no_locks(descriptor, operation): raise OSError(95, "Operation not supported")
  lock.fcntl.flock = no_locks
lock.socket.gethostname = lambda: sys.argv[3]
lock.TOUCH_S = 0.1
directory = pathlib.Path(sys.argv[1])
for turn in range(20):
  with lock.locked(directory, "work", lambda text: None, wait=True):
    mine = directory / "inside"
    mine.touch(exist_ok=False)  # raises where two hold it
    mine.unlink()
"""


@pytest.mark.parametrize("flock", ["flock", "no flock"])
def test_of_many_processes_on_several_hosts_one_holds_it_at_a_time(tmp_path, flock):
  left_by(tmp_path / LOCK, "gone", 1, 60)
  hosts = ["one", "two", "three", "one", "two"]
  processes = [subprocess.Popen([sys.executable, "-c", CONTEND, str(tmp_path), flock, host]) for host in hosts]
  assert [process.wait(60) for process in processes] == [0] * len(hosts)
  assert list(tmp_path.iterdir()) == []
