"""`python -m moejax.launch.tpu_vm`: creates TPU VMs with a queued resource, installs moejax, trains, and deletes them.

With --dry-run, it prints the gcloud commands without running them. Imports no JAX.
"""

import dataclasses
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from moejax.errors import UserError
from moejax.launch.hosts import Hosts, hosts_of
from moejax.launch.job import Job, Parser, make_job, make_parser

DESCRIPTION = """\
Run `moejax train` or `moejax compare` on Cloud TPU VMs: request them with a queued resource, wait until they are ready,
copy and install this checkout on every host, run the command on all hosts at once, and delete the TPU VMs.
The experiment, its fields and its mesh are checked against the topology first."""

EPILOG = """\
examples:
  print every command without running one:
    python -m moejax.launch.tpu_vm train dense_6b4 --topology v5p:4x4x4 --zone us-east5-a --workdir /mnt/runs/run1 \\
      --bucket my-bucket --mesh.replica 1 --dry-run
  two slices on Spot capacity:
    python -m moejax.launch.tpu_vm train moe_6b4_64e --topology v5p:4x4x4 --slices 2 --spot --zone us-east5-a \\
      --workdir /mnt/runs/run2 --bucket my-bucket --mesh.replica 2 --mesh.expert 16

A preempted run exits with code 75. The same command then creates new TPU VMs and resumes. --workdir must be on a file
system that all hosts share; --bucket mounts a Cloud Storage bucket at its parent directory on every host."""

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
POLL_S = 30
SOURCES = "~/moejax-source"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Settings of TPU VMs in addition to the job and its hosts."""

  name: str
  zone: str
  project: str | None = None
  spot: bool = False
  bucket: str | None = None
  """Bucket to mount at the parent of the work directory, or None if that is already shared."""
  mount: str = ""
  keep: bool = False
  """Whether to keep the TPU VMs after the command has ended."""


@dataclasses.dataclass(frozen=True)
class Commands:
  """The gcloud commands, in the order in which they run."""

  create: list[str]
  state: list[str]
  """Prints the state of the queued resource, which must become ACTIVE."""
  copy: list[list[str]]
  """One command per slice."""
  install: list[list[str]]
  run: list[list[str]]
  """One command per slice, which run concurrently."""
  delete: list[str]


def make_commands(job: Job, hosts: Hosts, settings: Settings) -> Commands:
  """The commands that run a job on TPU VMs."""
  where = [f"--zone={settings.zone}", *([f"--project={settings.project}"] if settings.project else [])]
  tpus = ["gcloud", "compute", "tpus"]
  nodes = [settings.name] if hosts.slices == 1 else [f"{settings.name}-{i}" for i in range(hosts.slices)]
  count = [f"--node-id={settings.name}"]
  if hosts.slices > 1:
    count = [f"--node-count={hosts.slices}", f"--node-prefix={settings.name}"]

  def on_all(node: str, command: str) -> list[str]:
    return [*tpus, "tpu-vm", "ssh", node, *where, "--worker=all", f"--command={command}"]

  return Commands(
    create=[
      *tpus, "queued-resources", "create", settings.name, *where, *count, *_accelerator(hosts),
      f"--runtime-version={hosts.product.runtime}", *(["--spot"] if settings.spot else []),
    ],
    state=[*tpus, "queued-resources", "describe", settings.name, *where, "--format=value(state.state)"],
    copy=[[*tpus, "tpu-vm", "scp", "--recurse", ".", f"{node}:{SOURCES}", *where, "--worker=all"] for node in nodes],
    install=[on_all(node, _install(settings)) for node in nodes],
    # Without MOEJAX_CLUSTER, JAX would not look for other hosts. `exec` forwards signals.
    run=[on_all(node, f"MOEJAX_CLUSTER=auto exec ~/moejax/bin/{job}") for node in nodes],
    delete=[*tpus, "queued-resources", "delete", settings.name, *where, "--force", "--quiet"],
  )  # fmt: skip


def _accelerator(hosts: Hosts) -> list[str]:
  """Accelerator options. In three dimensions, the shape must be given; in two, the number of chips determines it."""
  chips = math.prod(hosts.topology.torus)
  if len(hosts.topology.torus) == 2:
    return [f"--accelerator-type={hosts.product.vm_type}-{chips}"]
  return [f"--type={hosts.product.vm_type}", f"--topology={hosts.shape}"]


def _install(settings: Settings) -> str:
  steps = ["python3 -m venv ~/moejax", f"~/moejax/bin/pip install --quiet {SOURCES}'[tpu]'"]
  if settings.bucket:
    mount, bucket = shlex.quote(settings.mount), shlex.quote(settings.bucket)
    steps += [
      f"sudo mkdir -p {mount}",
      f"sudo chown $USER {mount}",
      f"(mountpoint -q {mount} || gcsfuse --implicit-dirs {bucket} {mount})",
    ]
  return " && ".join(steps)


def make_tpu_vm_parser() -> Parser:
  """The parser of this command. Fields of the experiment follow its options."""
  parser = make_parser(
    "moejax.launch.tpu_vm", DESCRIPTION, EPILOG, "work directory on the hosts, which all of them must share"
  )
  parser.add_argument("--zone", required=True, metavar="ZONE", help="zone with this TPU, such as us-east5-a")
  parser.add_argument("--project", metavar="ID", help="Google Cloud project (default: that of gcloud)")
  parser.add_argument("--name", metavar="NAME", help="name of the TPU VMs (default: from the experiment)")
  parser.add_argument("--spot", action="store_true", help="use Spot capacity")
  parser.add_argument("--bucket", metavar="NAME", help="Cloud Storage bucket, mounted at the parent of --workdir")
  parser.add_argument("--keep", action="store_true", help="do not delete the TPU VMs at the end")
  parser.add_argument("--dry-run", action="store_true", help="print the commands without running them")
  return parser


def main(arguments: Sequence[str] | None = None) -> int:
  """Prints or runs the commands. Returns the exit code of the job.

  Raises:
    UserError: If the arguments, the experiment or the topology are not valid.
  """
  known, overrides = make_tpu_vm_parser().parse_known_args(arguments)
  hosts = hosts_of(known.topology, known.slices)
  if hosts.product.runtime is None:
    raise UserError(f"there are no TPU VMs with {known.topology!r}; use python -m moejax.launch.gke")
  job = make_job(known.verb, known.experiment, known.workdir, overrides, hosts.topology)
  settings = Settings(
    name=known.name or job.label,
    zone=known.zone,
    project=known.project,
    spot=known.spot,
    bucket=known.bucket,
    mount=known.workdir.rstrip("/").rpartition("/")[0],
    keep=known.keep,
  )
  if not NAME.fullmatch(settings.name):
    raise UserError(
      f"--name {settings.name!r} must have 1 to 40 lower-case letters, digits and '-', and start with a letter"
    )
  if settings.bucket and not settings.mount:
    raise UserError(
      f"--workdir {known.workdir} is in /, where no bucket can be mounted; use, for example, /mnt/runs/run1"
    )
  commands = make_commands(job, hosts, settings)
  if known.dry_run:
    print("\n".join(_script(commands, settings)))
    return 0
  return _run(commands, settings)


def _script(commands: Commands, settings: Settings) -> list[str]:
  """The commands as a shell script."""
  lines = ["# 1. request the TPU VMs", shlex.join(commands.create)]
  lines += ["# 2. wait until this prints ACTIVE", shlex.join(commands.state)]
  lines += ["# 3. copy this checkout to every host and install it"]
  lines += [shlex.join(command) for command in (*commands.copy, *commands.install)]
  lines += ["# 4. run on all hosts" + (" of all slices at once" if len(commands.run) > 1 else "")]
  lines += [shlex.join(command) + (" &" if len(commands.run) > 1 else "") for command in commands.run]
  lines += ["wait"] if len(commands.run) > 1 else []
  return lines if settings.keep else [*lines, "# 5. delete the TPU VMs", shlex.join(commands.delete)]


def _run(commands: Commands, settings: Settings) -> int:
  """Runs the commands. The TPU VMs are deleted even after a failure."""
  subprocess.run(commands.create, check=True)
  try:
    _await_active(commands)
    for command in (*commands.copy, *commands.install):
      subprocess.run(command, check=True)
    slices = [_start(command) for command in commands.run]
    codes = [process.wait() for process in slices]
    return next((code for code in codes if code), 0)
  finally:
    if settings.keep:
      print(f"the TPU VMs are kept; delete them with: {shlex.join(commands.delete)}", file=sys.stderr)
    else:
      subprocess.run(commands.delete, check=True)


def _start(command: list[str]) -> subprocess.Popen[bytes]:
  return subprocess.Popen(command)


def _await_active(commands: Commands) -> None:
  told = ""
  while True:
    state = subprocess.run(commands.state, check=True, capture_output=True, text=True).stdout.strip()
    if state != told:
      print(f"queued resource: {state}", file=sys.stderr, flush=True)
    told = state
    if state == "ACTIVE":
      return
    if state in ("FAILED", "SUSPENDED", "SUSPENDING"):
      raise UserError(f"the queued resource is {state}; `{shlex.join(commands.state[:-1])}` shows the reason")
    time.sleep(POLL_S)


if __name__ == "__main__":
  try:
    sys.exit(main())
  except UserError as mistake:
    print(f"moejax.launch.tpu_vm: {mistake}", file=sys.stderr)
    sys.exit(2)
