"""Agreement of several processes at each training step: whether one was told to stop, and which is the slowest.

Z = processes
"""

import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moejax import processes
from moejax.interrupts import Deferral
from moejax.training.metrics import Record

SLOW = 0.1
"""Part of a step by which the input of one process may take longer than that of the median before it is named."""


class ProcessSync:
  """A small all-gather between all processes before each step, so that all take the same decision at the same step.
  A single process exchanges nothing.

  Only the time to read and place the input differs between processes: the rest of a step takes equally long on all of
  them, because each waits for the slowest.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self._several = processes.count() > 1
    self._everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._exchange = jax.jit(lambda sent: sent, out_shardings=NamedSharding(mesh, PartitionSpec()))
    owners = [device.process_index for device in mesh.devices.flat]
    self._of_process = [owners.index(process) for process in range(processes.count())] if self._several else []
    self._input_s = 0.0
    self._input_s_Z: list[np.ndarray] = []
    self._named: int | None = None
    self._began = 0.0

  def send(self, stop: Deferral) -> None:
    """Sends whether this process was told to stop and how long its last input took. Call it before a step's input is
    read."""
    if self._several:
      sent = np.array([[stop.signal, self._input_s]], np.float32)
      shape = (self._everywhere.num_devices, sent.shape[1])
      self._sent = self._exchange(jax.make_array_from_callback(shape, self._everywhere, lambda index: sent))
      self._began = time.perf_counter()

  def input_ready(self) -> None:
    """Call this when the step's input is on the devices."""
    self._input_s = time.perf_counter() - self._began

  def should_stop(self, stop: Deferral) -> bool:
    """Whether any process was told to stop before this step. All processes then stop after it."""
    if not self._several:
      return stop.requested
    signals_Z, input_s_Z = np.asarray(self._sent)[self._of_process].T
    self._input_s_Z.append(input_s_Z)
    if signals_Z.any():
      stop.accept(int(signals_Z.max()))
    return bool(signals_Z.any())

  def record(self) -> Record:
    """Mean seconds that each process took for its input since the last call, and the index of the slowest process."""
    if not self._input_s_Z:
      return {}
    mean_Z = np.mean(self._input_s_Z, axis=0)
    self._input_s_Z = []
    return {"input_time_s": [round(float(x), 6) for x in mean_Z], "slowest_process": int(mean_Z.argmax())}

  def warning(self, record: Record) -> str | None:
    """A warning that names the process whose input makes each step longer, or None. Each process is named once."""
    times_s = record.get("input_time_s", [])
    slowest = record.get("slowest_process")
    if slowest is None or slowest == self._named:
      return None
    others_s = float(np.median(np.delete(times_s, slowest)))
    if times_s[slowest] - others_s < SLOW * record["step_time_s"]:
      return None
    self._named = slowest
    return (
      f"{processes.name(slowest)} is the slowest: its input takes {times_s[slowest]:.3g} s of a step of "
      f"{record['step_time_s']:.3g} s, that of the others {others_s:.3g} s (step {record['step']}); check its disk and "
      "load, or raise data.prefetch"
    )
