"""The batch scripts on a real SLURM: two processes, a preemption, and the result of an undisturbed run."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
from slurm_cluster import install, slurm

from moejax.config import Experiment, Suite
from moejax.config.plain import to_plain

pytestmark = pytest.mark.nightly

ROOT = pathlib.Path(__file__).parents[2]
DEADLINE_S = 1200
STEPS = 400

# Two processes with a device each, which SLURM takes for two GPUs.
SIZE = ["--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=30", "--mem=0"]


class Cluster:
  """Submits batch scripts and asks about their jobs."""

  def __init__(self, environment: dict[str, str], folder: pathlib.Path):
    self.folder = folder
    program = folder / "bin" / "moejax"  # of this checkout, whether it is installed or not
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m moejax "$@"\n')
    program.chmod(0o755)
    self.environment = {
      **environment,
      "PATH": f"{program.parent}:{environment['PATH']}",
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }

  def run(self, *command: str) -> str:
    """The output of one of SLURM's commands."""
    return subprocess.run(
      command, env=self.environment, cwd=self.folder, capture_output=True, text=True, check=True
    ).stdout

  def submit(self, script: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
    """The number of the job."""
    submitted = self.run("sbatch", *SIZE, *options, str(ROOT / "launch" / "slurm" / script), *arguments)
    return submitted.split()[-1]

  def status(self, job: str) -> dict[str, str]:
    """What scontrol says of a job."""
    return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", job)))

  def logs(self, job: str) -> list[str]:
    """What a job, or each job of an array, has printed."""
    return [path.read_text() for path in sorted(self.folder.glob(f"moejax-*-{job}*.log"))]

  def log(self, job: str) -> str:
    """All that a job has printed."""
    return "\n".join(self.logs(job))

  def wait(self, job: str, until: Callable[[], bool]) -> None:
    """Waits for something that a job does; a job that ends before it has failed."""
    deadline = time.monotonic() + DEADLINE_S
    while not until():
      state = self.status(job)["JobState"]
      ended = state not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED") and not until()
      if ended or time.monotonic() > deadline:
        pytest.fail(f"job {job} is {state}\n{self.log(job)[-6000:]}")
      time.sleep(0.1)

  def finish(self, job: str) -> None:
    """Waits until a job has succeeded."""
    self.wait(job, lambda: self.status(job)["JobState"] == "COMPLETED")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  install()
  folder = tmp_path_factory.mktemp("slurm")
  with slurm(folder) as environment:
    yield Cluster(dict(environment), tmp_path_factory.mktemp("jobs"))


def written(path: pathlib.Path, configuration: Experiment | Suite) -> str:
  """The name of a configuration in a file. One of conftest.py would bring the environment of the tests with it."""
  path.write_text(json.dumps(to_plain(configuration)))
  return str(path)


def written_text(folder: pathlib.Path) -> str:
  """A folder of short documents."""
  folder.mkdir()
  for i in range(40):
    (folder / f"{i}.txt").write_text(f"chapter {i}: " + "it was the best of times, it was the worst of times; " * 40)
  return str(folder)


def steps(run: pathlib.Path) -> list[int]:
  """Steps that a run has written, in order."""
  path = run / "metrics.jsonl"
  records = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
  return [record["step"] for record in records if "loss" in record]


def test_a_preempted_job_resumes_under_its_number_and_ends_like_an_undisturbed_one(cluster, tmp_path, tiny_dense):
  experiment = written(tmp_path / "dense.json", tiny_dense)
  text = written_text(tmp_path / "text")
  fields = [
    "--data.train", text, "--training.steps", str(STEPS), "--training.log-every", "1",
    "--training.checkpoints.every", "1000", "--evaluation.max-tokens", "2000",
  ]  # fmt: skip
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  jobs = {run: cluster.submit("train.sbatch", experiment, "--workdir", str(run), *fields) for run in (stopped, whole)}
  cluster.wait(jobs[stopped], lambda: len(steps(stopped)) > 5)
  cluster.run("scancel", "--signal=TERM", jobs[stopped])
  for job in jobs.values():
    cluster.finish(job)

  assert cluster.status(jobs[stopped])["Restarts"] == "1" and cluster.status(jobs[whole])["Restarts"] == "0"
  said = cluster.log(jobs[stopped])
  assert f"preempted with its state saved; job {jobs[stopped]} is queued again" in said
  assert len(re.findall(r"stopped by SIGTERM; the same command continues from step \d+", said)) == 2
  assert 5 < int(re.findall(r"continues from step (\d+)", said)[0]) < STEPS
  assert steps(stopped) == steps(whole) == [*range(1, STEPS + 1)]
  of_each = [
    [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    for run in (whole, stopped)
  ]
  assert of_each[0] == of_each[1]
  scores = [dict(np.load(run / "held_out.npz")) for run in (whole, stopped)]
  assert scores[0].keys() == scores[1].keys()
  assert all(np.array_equal(scores[0][name], scores[1][name]) for name in scores[0])
  assert not (stopped / "lock").exists()


def test_a_mistake_ends_the_job_at_once(cluster, tmp_path, tiny_dense):
  experiment = written(tmp_path / "dense.json", tiny_dense)
  job = cluster.submit("train.sbatch", experiment, "--workdir", str(tmp_path / "run"), "--model.d-modle", "4")
  cluster.wait(job, lambda: cluster.status(job)["JobState"] == "FAILED")
  assert cluster.status(job)["ExitCode"] == "2:0"
  assert "no field 'model.d_modle'; did you mean --model.d-model?" in cluster.log(
    job
  ) and "attempt 1" not in cluster.log(job)


def test_jobs_of_an_array_share_a_comparison(cluster, tmp_path, tiny_suite):
  suite = written(tmp_path / "suite.json", tiny_suite)
  text = written_text(tmp_path / "text")
  fields = ["--data.train", text, "--training.steps", "40", "--evaluation.max-tokens", "2000"]
  shared = tmp_path / "shared"
  arguments = ["--workdir", str(shared), *fields, "--tolerance", "0.9", "--measurement.rounds", "2"]
  job = cluster.submit("compare.sbatch", suite, *arguments, options=("--array=0-1",))
  for task in ("0", "1"):
    cluster.finish(f"{job}_{task}")
  comparison = json.loads((shared / "comparison.json").read_text())
  assert comparison["complete"] and len(comparison["members"]) == 3
  assert (shared / "report" / "index.html").exists()
  assert sorted("measure step times, members in turn" in text for text in cluster.logs(job)) == [False, True]


def test_no_daemon_and_no_job_is_left(tmp_path):
  with slurm(tmp_path / "slurm") as environment:
    cluster = Cluster(dict(environment), tmp_path)
    (tmp_path / "sleep.sh").write_text("#!/bin/sh\nsrun sleep 1000\n")
    job = cluster.run("sbatch", "--mem=0", "--output=sleep.log", str(tmp_path / "sleep.sh")).split()[-1]
    cluster.wait(job, lambda: cluster.status(job)["JobState"] == "RUNNING")
  left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout.split()
  assert [pid for pid in left if int(pid) != os.getpid()] == []
