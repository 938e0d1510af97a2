"""Reads the environment variables that describe the processes of a program, without importing JAX.

A launcher sets JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. It can also set
JAX_COORDINATOR_BIND_ADDRESS, the only address on which process 0 then listens. Without these variables, JAX detects
SLURM, Open MPI and TPU pods. MOEJAX_CLUSTER=auto enables this detection where environment variables do not show that
there are several processes, as on a TPU VM and in Kubernetes.
"""

import os

from moejax.errors import UserError
from moejax.processes.rendezvous import Place

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
BIND = "JAX_COORDINATOR_BIND_ADDRESS"
CLUSTER = "MOEJAX_CLUSTER"
JOB = ("MOEJAX_JOB", "SLURM_JOB_ID")
"""Variables that distinguish two programs with the same address."""

CONNECT_TIMEOUT_S, HANG_TIMEOUT_S = "MOEJAX_CONNECT_TIMEOUT_S", "MOEJAX_HANG_TIMEOUT_S"
"""Timeouts in seconds: for all processes to connect to process 0, and for a process that does not respond or falls
behind the others in training."""

DEFAULTS = {CONNECT_TIMEOUT_S: 300.0, HANG_TIMEOUT_S: 60.0}

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""Variables that `srun` sets. In a batch script, which is a single process, some of them are not set."""


def is_one_of_several() -> bool:
  """Whether this process is one of several processes of a program, or JAX has to detect whether it is."""
  e = os.environ
  if COUNT in e or INDEX in e:
    return _number(COUNT) > 1
  return (
    e.get(CLUSTER) == "auto"
    or (all(name in e for name in SLURM) and e["SLURM_NTASKS"] != "1")
    or ("OMPI_MCA_orte_hnp_uri" in e and e.get("OMPI_COMM_WORLD_SIZE", "1") != "1")
    or "," in e.get("TPU_PROCESS_ADDRESSES", e.get("TPU_WORKER_HOSTNAMES", ""))
    or e.get("MEGASCALE_NUM_SLICES", "1") != "1"
  )


def given_place() -> Place | None:
  """The place of this process as set by the launcher, or None if JAX has to detect it.

  Raises:
    UserError: If a variable is missing or out of range.
  """
  if COUNT not in os.environ and INDEX not in os.environ:
    return None
  count, index = _number(COUNT), _number(INDEX)
  if not 0 <= index < count:
    raise UserError(f"{INDEX}={index} must be between 0 and {count - 1}, because {COUNT}={count}")
  return make_place(index, count, _value(ADDRESS))


def make_place(index: int, count: int, address: str) -> Place:
  """Makes a place, with the address on which process 0 listens.

  Raises:
    UserError: If an address is not HOST:PORT.
  """
  for name, value in ((ADDRESS, address), (BIND, os.environ.get(BIND, address))):
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
      raise UserError(f"{name}={value!r} is not HOST:PORT; set it to an address such as 10.0.0.1:8476")
  host = address.rpartition(":")[0]
  is_loopback = host == "localhost" or host.startswith("127.") or host == "[::1]"
  bind = os.environ[BIND].rpartition(":")[0] if BIND in os.environ else host if is_loopback else ""
  job = next((os.environ[name] for name in JOB if name in os.environ), "")
  return Place(index, count, address, bind.replace("localhost", "127.0.0.1").strip("[]"), job)


def seconds(name: str) -> float:
  """The value of one of the timeouts above.

  Raises:
    UserError: If it is not a positive number.
  """
  text = os.environ.get(name, str(DEFAULTS[name]))
  try:
    value = float(text)
  except ValueError:
    value = 0.0
  if not 0 < value < 1e7:
    raise UserError(f"{name}={text!r} is not a positive number of seconds")
  return value


def _number(name: str) -> int:
  text = _value(name)
  if not text.isdigit():
    raise UserError(f"{name}={text!r} is not a number")
  return int(text)


def _value(name: str) -> str:
  if not os.environ.get(name):
    raise UserError(f"{name} is not set; a launcher sets {ADDRESS}, {COUNT} and {INDEX} for each process")
  return os.environ[name]
