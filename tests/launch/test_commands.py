"""Whole commands on two processes: what they leave is written once, and is what one process leaves."""

import json
import shutil
import sys

import numpy as np
import pytest
from started import EXPERIMENTS, moejax, started, train

BENCHMARK = [
  {"id": str(i), "question": f"What is it at {i} o'clock?", "choices": {"text": ["sun", "salt"], "label": ["A", "B"]},
   "answerKey": "AB"[i % 2]}
  for i in range(6)
]  # fmt: skip


def succeed(count, command, folder, devices=1, **variables):
  with started(count, devices, command, folder, **variables) as all_of_them:
    codes = [process.wait(400) for process in all_of_them]
    logs = [process.output for process in all_of_them]
  assert codes == [0] * count, "\n".join(log[-3000:] for log in logs)
  return logs


@pytest.mark.slow
def test_a_run_is_written_once_and_shown_by_the_first_process(run_of_two):
  directory, _, (first, second) = run_of_two
  records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
  assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
  assert sum("held_out/bits_per_byte" in record for record in records) == 1
  assert all(len(record["input_time_s"]) == 2 for record in records if "loss" in record)
  assert {path.name for path in directory.iterdir()} == {
    "experiment.json", "text.json", "corpus", "metrics.jsonl", "tensorboard", "checkpoints", "held_out.npz",
    "summary.json",
  }  # fmt: skip
  assert len(list((directory / "tensorboard").iterdir())) == 1
  assert "mesh axes: data 4 across processes" in first and "held_out/bits_per_byte" in first
  assert " process 1: train sparse" in second and "held_out/bits_per_byte" not in second


@pytest.mark.slow
def test_a_comparison_on_two_processes_measures_trains_and_reports_once(text, tmp_path):
  directory = tmp_path / "comparison"
  data = ("--data.train", str(text / "train.txt"), "--data.validation", str(text / "validation.txt"))
  command = moejax("compare", f"{EXPERIMENTS}:suite", "--workdir", str(directory), *data)
  succeed(2, command, tmp_path)
  comparison = json.loads((directory / "comparison.json").read_text())
  assert {member["name"] for member in comparison["members"]} == {"dense", "sparse"}
  assert all(member["bits_per_byte"] > 0 and member["step_time_s"] > 0 for member in comparison["members"])
  assert comparison["pairs"][0]["verdict"] and comparison["provenance"]["process_count"] == 2
  assert (directory / "report" / "index.html").exists()
  before = (directory / "comparison.json").read_text()
  succeed(2, command, tmp_path)  # whatever is done is not done again
  assert json.loads((directory / "comparison.json").read_text())["members"] == json.loads(before)["members"]


@pytest.mark.slow
def test_benchmarks_on_two_processes_have_the_scores_of_one(run_of_two, tmp_path):
  pytest.importorskip("lm_eval")
  tasks = tmp_path / "tasks" / "arc_easy" / "test.jsonl"
  tasks.parent.mkdir(parents=True)
  tasks.write_text("".join(json.dumps(row) + "\n" for row in BENCHMARK))
  directory = tmp_path / "run"
  shutil.copytree(run_of_two[0], directory)
  command = moejax("evaluate", str(directory), "--tasks", "arc_easy", "--data", str(tmp_path / "tasks"))
  scores = []
  for count in (2, 1):
    for answers in (directory / "evaluation").glob("answers*"):
      answers.unlink()
    succeed(count, command, tmp_path)
    scores.append(json.loads((directory / "results.json").read_text())["results"]["arc_easy"])
  assert scores[0] == scores[1]


@pytest.mark.slow
def test_an_error_of_one_process_is_that_of_all(text, tmp_path):
  commands = [train(text, tmp_path / "run"), train(text, tmp_path / "run")]
  commands[1][commands[1].index(str(text / "train.txt"))] = "/nowhere/train.txt"
  with started(2, 1, commands, tmp_path) as both:
    assert [process.wait(120) for process in both] == [2, 2]
    assert all("/nowhere/train.txt" in process.output for process in both)
    assert "moejax: process 1 (host " in both[0].output


@pytest.mark.slow
def test_different_text_on_two_hosts_is_refused(text, tmp_path):
  other = tmp_path / "other.txt"
  other.write_text((text / "train.txt").read_text() + "\n\nmore")
  commands = [train(text, tmp_path / "run"), train(text, tmp_path / "run")]
  commands[1][commands[1].index(str(text / "train.txt"))] = str(other)
  with started(2, 1, commands, tmp_path) as both:
    assert [process.wait(120) for process in both] == [2, 2]
    assert any("finds other text than process" in process.output for process in both), both[0].output


@pytest.mark.slow
def test_a_directory_that_hosts_do_not_share_is_refused(text, tmp_path):
  commands = [train(text, tmp_path / "of-0"), train(text, tmp_path / "of-1")]
  code = (
    "from moejax.training import exclusive; exclusive.APPEARS_S = 1\nfrom moejax.__main__ import command; command()"
  )
  commands = [[sys.executable, "-c", code, *command[3:]] for command in commands]
  with started(2, 1, commands, tmp_path) as both:
    assert [process.wait(120) for process in both] == [2, 2]
    assert all(
      "process 1 (host " in process.output and "does not find the files of" in process.output for process in both
    )


@pytest.mark.slow
def test_a_slow_host_is_named(text, tmp_path):
  """The input of process 1 sleeps: a slow disk."""
  directory = tmp_path / "run"
  code = (
    "import time, numpy; from moejax.data import packing, pipeline; stack = pipeline.stack\n"
    "def slow(rows): time.sleep(1.0); return stack(rows)\n"
    "pipeline.stack = slow; from moejax.__main__ import command; command()"
  )
  command = train(text, directory, "dense", "--training.steps", "10", "--data.prefetch", "1")
  commands = [command, [sys.executable, "-c", code, *command[3:]]]
  with started(2, 1, commands, tmp_path) as both:
    assert [process.wait(200) for process in both] == [0, 0], both[0].output[-3000:]
    assert "warning: process 1 (host " in both[0].output and "is the slowest" in both[0].output
  records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
  times_s = np.array([record["input_time_s"] for record in records if "loss" in record])
  assert times_s[3:, 1].mean() > 0.5 > times_s[3:, 0].mean()
  assert records[-2]["slowest_process"] == 1
