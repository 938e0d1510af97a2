"""Synchronizes processes at each training step: whether to stop, and which process is the slowest.

Y = recent steps  Z = processes
"""

import collections
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moejax import processes
from moejax.interrupts import Deferral
from moejax.training.metrics import Record

SLOW, SLOW_S = 0.1, 0.02
"""A process is slow if its input takes longer than that of the others by more than this fraction of a step and by more
than these seconds."""
MOSTLY = 0.75
"""Fraction of the recent steps in which it must be so, since single steps are delayed by chance."""
FEWEST_STEPS, RECENT_STEPS = 5, 20
"""Minimum and maximum number of recent steps that are compared."""


def slow_process(input_s_YZ: np.ndarray, step_time_s: float) -> int | None:
  """The process whose input delays most of these steps, or None."""
  if len(input_s_YZ) < FEWEST_STEPS:
    return None
  slowest = int(np.median(input_s_YZ, axis=0).argmax())
  others_s_Y = np.median(np.delete(input_s_YZ, slowest, axis=1), axis=1)
  is_late_Y = input_s_YZ[:, slowest] - others_s_Y > max(SLOW * step_time_s, SLOW_S)
  return slowest if is_late_Y.mean() >= MOSTLY else None


class ProcessSync:
  """A small all-gather before each step, so that all processes make the same decision at the same step.

  It does nothing in a program with a single process.

  Only the time to read and transfer the input can be measured for each process. The rest of a step takes the same time
  on all of them, because each waits for the slowest, so that a slow device is not seen here.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self._several = processes.count() > 1
    self._everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._exchange = jax.jit(lambda sent: sent, out_shardings=NamedSharding(mesh, PartitionSpec()))
    owners = [device.process_index for device in mesh.devices.flat]
    self._of_process = [owners.index(process) for process in range(processes.count())] if self._several else []
    self._input_s = 0.0
    self._input_s_Z: list[np.ndarray] = []
    self._recent_s_YZ: collections.deque[np.ndarray] = collections.deque(maxlen=RECENT_STEPS)
    self._named: int | None = None
    self._began = 0.0
    processes.wait_for_all()

  def send(self, stop: Deferral) -> None:
    """Sends whether this process has received a stop signal and how long its last input took. Must be called before the
    input of a step is read."""
    if self._several:
      sent = np.array([[stop.signal, self._input_s]], np.float32)
      shape = (self._everywhere.num_devices, sent.shape[1])
      self._sent = self._exchange(jax.make_array_from_callback(shape, self._everywhere, lambda index: sent))
      self._began = time.perf_counter()

  def input_ready(self) -> None:
    """Must be called when the input of the step is on the devices."""
    self._input_s = time.perf_counter() - self._began

  def should_stop(self, stop: Deferral) -> bool:
    """Whether any process had received a stop signal before this step. If so, all processes stop after it."""
    if not self._several:
      return stop.requested
    signals_Z, input_s_Z = np.asarray(self._sent)[self._of_process].T
    self._input_s_Z.append(input_s_Z)
    self._recent_s_YZ.append(input_s_Z)
    if signals_Z.any():
      stop.accept(int(signals_Z.max()))
    return bool(signals_Z.any())

  def record(self) -> Record:
    """Mean input time of each process in seconds since the last call, and the index of the slowest process."""
    if not self._input_s_Z:
      return {}
    mean_Z = np.mean(self._input_s_Z, axis=0)
    self._input_s_Z = []
    return {"input_time_s": [round(float(x), 6) for x in mean_Z], "slowest_process": int(mean_Z.argmax())}

  def warning(self, record: Record) -> str | None:
    """A warning for a process whose slow input delays each step, or None. Each process is reported once."""
    if not self._recent_s_YZ:
      return None
    recent_s_YZ = np.stack(self._recent_s_YZ)
    slowest = slow_process(recent_s_YZ, record["step_time_s"])
    if slowest is None or slowest == self._named:
      return None
    self._named = slowest
    times_s_Z = np.median(recent_s_YZ, axis=0)
    others_s = float(np.median(np.delete(times_s_Z, slowest)))
    return (
      f"{processes.name(slowest)} is the slowest: its input takes {times_s_Z[slowest]:.3g} s of a step of "
      f"{record['step_time_s']:.3g} s, compared with {others_s:.3g} s on the others (step {record['step']}); check its "
      "disk and load, or raise data.prefetch"
    )
