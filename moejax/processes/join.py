"""Connects this process with the others of its program and initializes `jax.distributed`.

This must happen before anything else uses JAX.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence

import jax
from jax._src import clusters  # JAX's detection of SLURM, Open MPI and TPU pods, which has no public name

from moejax import interrupts, processes
from moejax.errors import UserError, reason
from moejax.processes.channel import Channel
from moejax.processes.environment import CONNECT_TIMEOUT_S, HANG_TIMEOUT_S, given_place, make_place, seconds
from moejax.processes.rendezvous import Place, connect

NO_LIMIT_S = 10**6
"""Value of timeouts of JAX that the channel replaces."""


def join() -> None:
  """Connects this process with the others. Does nothing if they are connected already or there are none.

  Raises:
    UserError: If no cluster is detected, or jax.distributed is initialized already.
    Failure: If other processes are missing.
  """
  if processes.count() > 1:
    return
  if jax.distributed.is_initialized():
    raise UserError(
      "jax.distributed is already initialized; remove that call, because moejax initializes it and monitors the "
      "processes"
    )
  connect_s, silence_s = seconds(CONNECT_TIMEOUT_S), seconds(HANG_TIMEOUT_S)
  place, devices = _place(connect_s)
  if place is None:
    return
  connections = connect(place, connect_s)
  processes.joined(Channel(place, connections, silence_s))
  atexit.register(_leave)
  _await_failure_report_at_abort()
  # JAX's handler of SIGTERM would replace that of moejax.interrupts, whose signals the channel forwards.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    connections.coordinator,
    place.count,
    place.index,
    local_device_ids=devices,
    cluster_detection_method="deactivate",
    initialization_timeout=int(connect_s) + 1,
    coordinator_bind_address=f"{_bracketed(place.bind) or '[::]'}:{connections.coordinator.rpartition(':')[2]}",
    heartbeat_timeout_seconds=int(2 * silence_s) + 60,  # the channel detects failures earlier and reports the reason
    shutdown_timeout_seconds=NO_LIMIT_S,
  )


def _place(connect_s: float) -> tuple[Place | None, Sequence[int] | None]:
  """The place of this process (None if it is the only one), and the indices of its GPUs on its host (None: all)."""
  if (place := given_place()) is not None:
    return place, None  # JAX reads JAX_LOCAL_DEVICE_IDS itself
  address, count, index, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
    os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, int(connect_s)
  )
  if address is None or count is None or index is None:
    raise UserError(
      "JAX detects no cluster that this process belongs to; set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
      "JAX_PROCESS_ID, or unset MOEJAX_CLUSTER"
    )
  return (make_place(index, count, address) if count > 1 else None), devices


def _bracketed(host: str) -> str:
  return f"[{host}]" if ":" in host else host


def _leave() -> None:
  """Runs when the interpreter exits. Waits for the other processes after success, and ends them after a failure."""
  error = getattr(sys, "last_value", None)
  if error is not None:
    processes.fail(1, reason(error))
  code = processes.failed()
  if code is not None:  # the others have exited: jax.distributed.shutdown would wait for them
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    interrupts.exit_now(code)
  jax.distributed.shutdown()
  processes.leave(0)


def _await_failure_report_at_abort() -> None:
  """JAX aborts this process if process 0 is gone. Waits before the abort, so that the channel can report the reason."""
  ctypes.CDLL(None).signal(signal.SIGABRT, _ON_ABORT)


_ON_ABORT = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: processes.await_failure_report())
