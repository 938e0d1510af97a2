"""A real SLURM of one node on this machine: munged, slurmctld and slurmd, with all files in one directory.

`python tests/launch/slurm_cluster.py DIR` starts one and keeps it until Ctrl-C, to try `sbatch` by hand. Debian's and
Ubuntu's package is `slurm-wlm`; `install` gets it where it is missing.
"""

import contextlib
import getpass
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol")
START_S = 60
DEVICES = ("null", "zero", "full", "random")
"""What SLURM takes for the devices of GPUs. Nothing opens them."""

# One node that claims four CPUs and four GPUs, whatever it has. No accounting, cgroups or systemd: a container has
# none. cred_expire is also what a job that is queued again waits.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=30
MinJobAge=600
GresTypes=gpu
NodeName={host} Gres=gpu:4 CPUs=4 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def install() -> None:
  """Installs SLURM from the distribution's packages where it is missing."""
  if missing():
    prefix = [] if os.geteuid() == 0 else ["sudo"]
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "slurm-wlm", "munge"]):
      subprocess.run([*prefix, "apt-get", *command], check=True, stdout=subprocess.DEVNULL)


def missing() -> list[str]:
  """Programs of SLURM that are not on this machine."""
  return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]


@contextlib.contextmanager
def slurm(directory: pathlib.Path) -> Iterator[Mapping[str, str]]:
  """A cluster of one node, with all of its files in `directory`. Yields the environment in which its commands run."""
  for name in ("state", "spool"):
    (directory / name).mkdir(parents=True, exist_ok=True)
  directory.chmod(0o755)  # munged refuses a socket in a directory that not everybody can enter
  key = directory / "munge.key"
  key.write_bytes(os.urandom(128))
  key.chmod(0o400)
  configuration = directory / "slurm.conf"
  configuration.write_text(
    CONFIGURATION.format(
      directory=directory,
      host=socket.gethostname().partition(".")[0],
      user=getpass.getuser(),
      controller_port=_free_port(),
      node_port=_free_port(),
    )
  )
  (directory / "gres.conf").write_text("AutoDetect=off\n" + "".join(f"Name=gpu File=/dev/{name}\n" for name in DEVICES))
  environment = {**os.environ, "SLURM_CONF": str(configuration), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
  commands = (
    [
      "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={directory}/munge.socket",
      f"--pid-file={directory}/munged.pid",
      f"--seed-file={directory}/munged.seed", f"--log-file={directory}/munged.log",
    ],
    ["slurmctld", "-D", "-f", str(configuration)],
    ["slurmd", "-D", "-f", str(configuration)],
  )  # fmt: skip
  with contextlib.ExitStack() as daemons:
    for command in commands:
      log = daemons.enter_context((directory / f"{command[0]}.out").open("w"))
      daemon = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
      daemons.callback(_stop, daemon)
      if command[0] == "munged":
        _wait(lambda: (directory / "munge.socket").exists(), "munged", directory)
    _wait(lambda: "idle" in _output(["sinfo", "-h", "-o", "%T"], environment), "slurmd", directory)
    try:
      yield environment
    finally:
      _end_jobs(environment)


def _end_jobs(environment: Mapping[str, str]) -> None:
  """Cancels all jobs, since their processes would outlive the daemons, and waits until they have ended."""
  deadline = time.monotonic() + START_S
  while (jobs := _output(["squeue", "-h", "-o", "%i"], environment).split()) and time.monotonic() < deadline:
    subprocess.run(["scancel", "--signal=KILL", "--full", *jobs], env=environment, capture_output=True)
    subprocess.run(["scancel", *jobs], env=environment, capture_output=True)
    time.sleep(1)


def _stop(daemon: subprocess.Popen) -> None:
  daemon.terminate()
  try:
    daemon.wait(20)
  except subprocess.TimeoutExpired:
    daemon.kill()
    daemon.wait()


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("", 0))
    return int(probe.getsockname()[1])


def _wait(ready, what: str, directory: pathlib.Path) -> None:
  deadline = time.monotonic() + START_S
  while not ready():
    if time.monotonic() > deadline:
      logs = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in directory.glob("*.log"))
      raise RuntimeError(f"{what} did not start within {START_S} s\n{logs}")
    time.sleep(0.1)


def _output(command: list[str], environment: Mapping[str, str]) -> str:
  return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


if __name__ == "__main__":
  install()
  with slurm(pathlib.Path(sys.argv[1]).absolute()) as where:
    print(f"export SLURM_CONF={where['SLURM_CONF']}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
      signal.pause()
