"""The process of a command: places it cannot write to are one line, bugs are told apart, callers are left alone."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from moejax import cli, huge_pages

MINE = pathlib.Path(__file__).parent / "conftest.py"
DENSE, SPARSE, SUITE = (f"{MINE}:{name}" for name in ("dense", "sparse", "suite"))
TEXT = ["--data.train", "{tmp}/file.txt", "--data.validation", str(MINE)]

# The option whose path comes last; a folder's and a file's.
FOLDERS = {
  "train": ["train", DENSE, *TEXT, "--workdir"],
  "compare": ["compare", SUITE, *TEXT, "--workdir"],
  "data pack": ["data", "pack", "--source", "{tmp}/file.txt", "--processes", "1", "--out"],
}
FILES = {
  "tokenizer": ["tokenizer", "train", "--source", "{tmp}/file.txt", "--out"],
  "plan --json": ["plan", DENSE, "--topology", "cpu:8", "--json"],
  "plan --html": ["plan", DENSE, "--topology", "cpu:8", "--html"],
  "plan --search": ["plan", DENSE, "--topology", "cpu:8", "--search", "--json"],
  "plan --search --html": ["plan", DENSE, "--topology", "cpu:8", "--search", "--html"],
  "plan --calibration": ["plan", DENSE, "--topology", "cpu:8", "--against", "1", "--calibration"],
  "calibrate": ["calibrate", "--out"],
  "decide --json": ["decide", DENSE, SPARSE, "--topology", "cpu:8", "--days", "1", "--json"],
  "check-claim --json": ["check-claim", "{tmp}/file.txt", "--json"],
  "fit --json": ["fit", "{tmp}/file.txt", "--json"],
  "match": ["match", DENSE, SPARSE, "--topology", "cpu:8", "--out"],
}
PLACES = {
  **{f"{name} to a file": ([*words, "{tmp}/file.txt"], "it is a file") for name, words in FOLDERS.items()},
  **{f"{name} below a file": ([*words, "{tmp}/file.txt/new"], "Not a directory") for name, words in FOLDERS.items()},
  **{f"{name} below a file": ([*words, "{tmp}/file.txt/new.json"], "it is a file") for name, words in FILES.items()},
  **{f"{name} to a folder": ([*words, "{tmp}/folder.json"], "it is a directory") for name, words in FILES.items()},
}


@pytest.mark.parametrize("arguments, reason", PLACES.values(), ids=PLACES)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(arguments, reason, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  (tmp_path / "file.txt").write_text("Some text.\n" * 1000)
  (tmp_path / "folder.json").mkdir()
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(SystemExit) as stopped:
    cli.main([argument.format(tmp=tmp_path) for argument in arguments])
  out, err = capsys.readouterr()
  assert (stopped.value.code, out) == (2, "") and err.count("\n") == 1 and reason in err, err
  assert sorted(tmp_path.rglob("*")) == before


def test_a_bug_keeps_its_traceback_and_the_last_line_says_what_to_do_with_it():
  broken = (
    "import sys; sys.argv = ['moejax', 'list']\nfrom moejax import __main__, cli\ncli.make_parser = None\n"
    "__main__.command()"
  )
  done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, check=False)
  assert done.returncode == 1 and done.stderr.startswith("Traceback") and "TypeError" in done.stderr
  assert done.stderr.splitlines()[-1] == "moejax: this is a bug in moejax; please report it with the lines above"


def test_main_replaces_no_process_and_leaves_signal_handlers_as_they_were(monkeypatch):
  monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("the process is replaced"))
  before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
  for words in (["list"], ["train", DENSE, "--workdir", f"{MINE}/run"]):
    with pytest.raises(SystemExit):
      cli.main(words)
  assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_process_restarts_for_huge_pages_on_cpu_alone(monkeypatch, tmp_path):
  accelerator = tmp_path / "nvidia0"
  monkeypatch.setattr(huge_pages, "ACCELERATORS", (f"{tmp_path}/nvidia[0-9]*",))
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  assert huge_pages.computes_on_cpu()
  accelerator.touch()
  assert not huge_pages.computes_on_cpu()
  for platforms, on_cpu in (("cpu", True), ("cuda", False), ("tpu,cpu", False)):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert huge_pages.computes_on_cpu() == on_cpu


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_outputs_are_no_obstacle(closed):
  assert (
    subprocess.run(f"{sys.executable} -m moejax show quick_small {closed}", shell=True, check=False).returncode == 0
  )
