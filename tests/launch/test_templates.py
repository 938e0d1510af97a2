"""Files that users submit as they are: SLURM scripts, the SkyPilot task, and the packaging of all of them."""

import pathlib
import re
import shutil
import subprocess

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = [LAUNCH / "slurm" / name for name in ("train.sbatch", "compare.sbatch")]


def parts(script: pathlib.Path) -> tuple[list[str], str]:
  """The options and the commands of a batch script."""
  text = script.read_text()
  options = re.findall(r"^#SBATCH (\S+)$", text, re.M)
  return options, text[text.index("set -uo pipefail") :]


def test_both_scripts_run_the_same_commands():
  (train_options, train), (compare_options, compare) = map(parts, SCRIPTS)
  assert train.replace("verb=train", "verb=compare") == compare != train
  assert "--array=0-3" in compare_options and not any("--array" in option for option in train_options)
  for options in (train_options, compare_options):
    assert {"--requeue", "--open-mode=append", "--signal=TERM@180"} <= {*options}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_bash(script):
  parsed = subprocess.run([shutil.which("bash") or "bash", "-n", str(script)], capture_output=True, text=True)
  assert (parsed.returncode, parsed.stderr) == (0, "")


STUBS = """
srun() {{ echo "srun $*" >> calls; return $(sed -n "$(wc -l < calls)p" codes); }}
scontrol() {{ echo "scontrol $*" >> calls; }}
sleep() {{ :; }}
source {script}
"""


@pytest.fixture
def run(tmp_path):
  """Runs a batch script in a job whose steps end with these exit codes; returns its exit code, calls and output."""

  def run_script(codes: list[int], arguments: str = "dense --workdir /shared/a", **environment: str):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    (tmp_path / "calls").write_text("")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8"}
    done = subprocess.run(
      ["bash", "-c", STUBS.format(script=f"{SCRIPTS[0]} {arguments}")],
      cwd=tmp_path, env={"PATH": "/usr/bin:/bin", **job, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, (tmp_path / "calls").read_text().splitlines(), done.stdout + done.stderr

  return run_script


def test_a_preempted_job_is_queued_again_and_a_finished_one_or_a_mistake_is_not(run):
  assert run([75]) == (75, [*run([0])[1], "scontrol requeue 7"], run([75])[2])
  for code in (0, 2, 3):
    returned, calls, _ = run([code])
    assert (returned, len(calls)) == (code, 1)
    assert calls[0].endswith("moejax train dense --workdir /shared/a")


def test_a_failure_is_tried_again_a_limited_number_of_times(run):
  code, calls, said = run([1, 137, 0])
  assert (code, len(calls)) == (0, 3) and "failed with exit code 137" in said
  code, calls, said = run([1] * 9, MAX_RESTARTS="2")
  assert (code, len(calls)) == (1, 3) and "failed with exit code 1 after 3 attempts" in said


def test_what_was_stopped_before_it_saved_anything_is_queued_again_a_limited_number_of_times(run):
  assert run([143])[1][-1] == "scontrol requeue 7"
  code, calls, _ = run([143], SLURM_RESTART_COUNT="3")
  assert code == 143 and "scontrol requeue 7" not in calls


def test_gpus_that_no_process_would_use_are_an_error(run):
  code, calls, said = run([0], SLURM_NTASKS_PER_NODE="1")
  assert (code, calls) == (
    2,
    [],
  ) and "1 processes on each node would use 1 of its 8 GPUs; add --ntasks-per-node=8" in said
  code, calls, said = run([0], SLURM_GPUS_PER_TASK="1")
  assert (code, calls) == (2, []) and "use --gpus-per-node" in said


def test_the_job_runs_in_the_container_that_is_named(run):
  _, (call,), _ = run([0], PYXIS_IMAGE="registry/moejax:1", PYXIS_MOUNTS="/shared:/shared")
  assert "--container-image=registry/moejax:1 --container-mounts=/shared:/shared moejax train" in call
  _, (call,), _ = run([0], APPTAINER_IMAGE="/shared/my image.sif", APPTAINER_BINDS="/shared")
  assert call.endswith("apptainer exec --nv --bind /shared /shared/my image.sif moejax train dense --workdir /shared/a")


def test_the_skypilot_task_starts_one_process_on_each_host_that_a_preemption_resumes():
  task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
  assert {*task} == {"name", "num_nodes", "resources", "envs", "workdir", "file_mounts", "setup", "run"}
  assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8"
  assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
  (mount,) = task["file_mounts"].values()
  assert mount == {"name": "${BUCKET}", "mode": "MOUNT"}
  used = {*re.findall(r"\$\{?([A-Z_]+)", task["setup"] + task["run"])}
  of_sky = {"SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"}
  assert used == of_sky | ({*task["envs"]} - {"BUCKET"})
  for script in (task["setup"], task["run"]):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(("platform", "rank"), [("gpu", 0), ("gpu", 1), ("tpu", 0)])
def test_each_host_of_skypilot_knows_its_place(tmp_path, platform, rank):
  moejax = tmp_path / "moejax" / "bin" / "moejax"
  moejax.parent.mkdir(parents=True)
  moejax.write_text('#!/bin/sh\necho "$@"; env | grep -E "^(JAX|MOEJAX)_" | sort\n')
  moejax.chmod(0o755)
  task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
  given = {**task["envs"], "EXPERIMENT": "dense_6b4", "FIELDS": "--mesh.data 8", "PLATFORM": platform}
  sky = {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(rank)}
  environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **given, **sky}
  done = subprocess.run(["bash", "-c", task["run"]], env=environment, capture_output=True, text=True, check=True)
  command, *variables = done.stdout.splitlines()
  assert command == "train dense_6b4 --workdir /runs/dense_6b4 --mesh.data 8"
  place = ["JAX_COORDINATOR_ADDRESS=10.0.0.4:8482", "JAX_NUM_PROCESSES=2", f"JAX_PROCESS_ID={rank}"]
  assert variables == (place if platform == "gpu" else ["MOEJAX_CLUSTER=auto"])
