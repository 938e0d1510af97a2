"""The gcloud commands of a job on TPU VMs: exact for one and for two slices, run in order, undone after a failure."""

import shlex
import subprocess

import pytest

from moejax.errors import UserError
from moejax.launch import tpu_vm

JOB = ["train", "dense_6b4", "--zone", "us-east5-a", "--workdir", "/mnt/runs/one", "--mesh.expert", "1"]
SLICE = [*JOB, "--topology", "v5p:4x4x4", "--mesh.replica", "1", "--mesh.data", "64"]


def dry_run(capsys, *arguments: str) -> list[str]:
  assert tpu_vm.main([*arguments, "--dry-run"]) == 0
  return capsys.readouterr().out.splitlines()


def test_a_dry_run_prints_every_command_in_order(capsys):
  where = "--zone=us-east5-a --project=my-project"
  ssh = f"gcloud compute tpus tpu-vm ssh dense-6b4 {where} --worker=all"
  assert dry_run(capsys, *SLICE, "--project", "my-project", "--bucket", "my-bucket") == [
    "# 1. request the TPU VMs",
    f"gcloud compute tpus queued-resources create dense-6b4 {where} --node-id=dense-6b4 --type=v5p --topology=4x4x4 "
    "--runtime-version=v2-alpha-tpuv5",
    "# 2. wait until this prints ACTIVE",
    f"gcloud compute tpus queued-resources describe dense-6b4 {where} '--format=value(state.state)'",
    "# 3. copy this checkout to every host and install it",
    f"gcloud compute tpus tpu-vm scp --recurse . 'dense-6b4:~/moejax-source' {where} --worker=all",
    f"{ssh} "
    + shlex.quote(
      "--command=python3 -m venv ~/moejax && ~/moejax/bin/pip install --quiet ~/moejax-source'[tpu]' && "
      "sudo mkdir -p /mnt/runs && sudo chown $USER /mnt/runs && "
      "(mountpoint -q /mnt/runs || gcsfuse --implicit-dirs my-bucket /mnt/runs)"
    ),
    "# 4. run on all hosts",
    f"{ssh} "
    + shlex.quote(
      "--command=MOEJAX_CLUSTER=auto exec ~/moejax/bin/moejax train dense_6b4 --workdir /mnt/runs/one "
      "--mesh.expert 1 --mesh.replica 1 --mesh.data 64"
    ),
    "# 5. delete the TPU VMs",
    f"gcloud compute tpus queued-resources delete dense-6b4 {where} --force --quiet",
  ]


def test_slices_are_nodes_that_are_installed_one_by_one_and_run_at_once(capsys):
  lines = dry_run(
    capsys, *JOB, "--topology", "v6e:8x8", "--slices", "2", "--spot", "--name", "two", "--mesh.replica", "2"
  )
  (create,) = [line for line in lines if "create" in line]
  assert "--node-count=2 --node-prefix=two --accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e --spot" in create
  runs = [line for line in lines if "moejax train" in line]
  assert [line.split()[5] for line in runs] == ["two-0", "two-1"] and all(line.endswith(" &") for line in runs)
  assert lines[lines.index(runs[-1]) + 1] == "wait"
  assert not any("gcsfuse" in line for line in lines)
  assert "# 5. delete the TPU VMs" not in dry_run(capsys, *SLICE, "--keep")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([*JOB, "--topology", "tpu7x:4x4x4"], "no TPU VMs with 'tpu7x:4x4x4'; use python -m moejax.launch.gke"),
    ([*JOB, "--topology", "gpu:h100:8"], "no TPU VMs with 'gpu:h100:8'"),
    ([*JOB, "--topology", "v5p:4x4x4", "--mesh.data", "32"], "does not tile the 64 devices"),
    ([*SLICE, "--name", "My_run"], "--name 'My_run' must have 1 to 40 lower-case letters"),
    ([*SLICE, "--workdir", "/one", "--bucket", "b"], "--workdir /one is in /, where no bucket can be mounted"),
    (SLICE[:2], "the following arguments are required: --workdir, --topology, --zone"),
  ],
)
def test_a_mistake_is_one_line_with_its_remedy(arguments, message):
  with pytest.raises(UserError, match=message):
    tpu_vm.main([*arguments, "--dry-run"])


class Cloud:
  """Stands for gcloud: notes the commands, answers states, and fails where a command has a word."""

  def __init__(self, states: list[str], fails_at: str = "", code: int = 0):
    self.states, self.fails_at, self.code = states, fails_at, code
    self.verbs: list[str] = []

  def run(self, command, check=False, capture_output=False, text=False):
    verb = command[4] if command[3] != "tpu-vm" else f"{command[4]} {'moejax train' in command[-1]}"
    self.verbs.append(verb)
    if self.fails_at and self.fails_at in verb:
      raise subprocess.CalledProcessError(1, command)
    return subprocess.CompletedProcess(command, 0, self.states.pop(0) if verb == "describe" else "")

  def popen(self, command):
    self.run(command)
    process = subprocess.Popen(["sh", "-c", f"exit {self.code}"])
    return process


@pytest.fixture
def cloud(monkeypatch):
  def make(*arguments, **keywords) -> Cloud:
    made = Cloud(*arguments, **keywords)
    monkeypatch.setattr(tpu_vm.subprocess, "run", made.run)
    monkeypatch.setattr(tpu_vm.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(tpu_vm, "_start", made.popen)
    return made

  return make


def test_it_waits_for_the_resource_runs_the_job_and_gives_its_exit_code(cloud):
  made = cloud(["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], code=75)
  assert tpu_vm.main(SLICE) == 75
  assert made.verbs == ["create", *["describe"] * 3, "scp False", "ssh False", "ssh True", "delete"]


def test_what_was_created_is_deleted_after_a_failure(cloud):
  made = cloud(["ACTIVE"], fails_at="scp")
  with pytest.raises(subprocess.CalledProcessError):
    tpu_vm.main(SLICE)
  assert made.verbs == ["create", "describe", "scp False", "delete"]
  refused = cloud(["FAILED"])
  with pytest.raises(UserError, match=r"the queued resource is FAILED; `gcloud .* describe .*` shows the reason"):
    tpu_vm.main(SLICE)
  assert refused.verbs[-1] == "delete"
