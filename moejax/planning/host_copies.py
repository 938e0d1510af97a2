"""Copies between the memory of a device and that of its host, as a program with offload makes them."""

import dataclasses

from moejax.config.chips import Chip
from moejax.planning.program import Computation, Instruction, Program

HOST_SPACE = 5
"""The memory space of the host in a compiled program."""

HOST_BANDWIDTH = {
  "v4": 16e9, "v5e": 16e9, "v5p": 16e9, "v6e": 32e9, "tpu7x": 16e9, "a100": 32e9, "h100": 64e9, "h200": 64e9,
  "b200": 64e9, "gb200": 225e9,
}  # fmt: skip
"""Bytes a second between the host and one device, each way. v4: jax-ml.github.io/scaling-book/tpus; taken for v5e, v5p
and a core of tpu7x too, and twice that for v6e. NVIDIA: PCIe of the fourth (A100) and fifth generation, data sheets; of
GB200, two GPUs share an NVLink-C2C of 450 GB/s each way."""

FORWARD = 1 / 3
"""Part of the step during which the forward pass runs."""

STAYING_LAYERS = 2
"""Layers whose offloaded activations are on the device at any time: that which is moved, and that which is computed."""


def host_bandwidth(chip: Chip) -> float:
  """Bytes a second between the host and a device, each way. A CPU uses the memory of its host."""
  return HOST_BANDWIDTH.get(chip.name, chip.hbm_bandwidth)


def exposed_by_formula(activations_s: float, moments_s: float, step_time_s: float) -> float:
  """Seconds of a step that wait for the host.

  Args:
    activations_s: seconds of the copies of activations, each way. They are written in the forward pass and read in the
      backward pass, both behind computation as far as it takes as long.
    moments_s: the same of moments, which are read and written, in both directions at once, while the update waits.
    step_time_s: seconds of the step without these copies.
  """
  forward_s = FORWARD * step_time_s
  return moments_s + max(0.0, activations_s - forward_s) + max(0.0, activations_s - (step_time_s - forward_s))


@dataclasses.dataclass(frozen=True)
class HostCopy:
  """One copy to or from the host."""

  bytes: int
  to_host: bool


def host_copy(program: Program, computation: Computation, instruction: Instruction) -> HostCopy | None:
  """The copy that an instruction makes or, with `-start`, begins. None for any other instruction. On GPU, a copy is in
  a fusion of its own."""
  if instruction.opcode in ("fusion", "fusion-start"):
    inner = program.computations.get("".join(instruction.called("calls")))
    if inner is None:
      return None
    computation, instruction = inner, inner.root
  kind = instruction.opcode.removesuffix("-start")
  if kind not in ("copy", "dynamic-slice", "dynamic-update-slice"):
    return None
  source = computation.by_name.get(instruction.operands[0])
  from_host = source is not None and source.shapes[0].space == HOST_SPACE
  if kind == "dynamic-update-slice":
    update = computation.by_name.get(instruction.operands[1])
    return HostCopy(update.bytes, to_host=True) if from_host and update is not None else None
  # The result of a `-start` instruction also has its operands: after the copy, but before the slice.
  result = instruction.shapes[-2 if kind == "dynamic-slice" and instruction.opcode != kind else 0]
  if (result.space == HOST_SPACE) == from_host:
    return None
  return HostCopy(result.bytes, to_host=not from_host)


class HostLink:
  """The link to the host while a computation runs: one copy at a time in each direction. Times are in seconds since the
  start of the computation."""

  def __init__(self, chip: Chip):
    self._rate = host_bandwidth(chip)
    self._free = {True: 0.0, False: 0.0}
    self._arrives: dict[str, float] = {}

  def begin(self, name: str, copy: HostCopy, now: float) -> float:
    """Starts a copy, and returns the seconds that it takes."""
    seconds = copy.bytes / self._rate
    self._free[copy.to_host] = self._arrives[name] = max(self._free[copy.to_host], now) + seconds
    return seconds

  def has(self, name: str) -> bool:
    """Whether an instruction with this name started a copy."""
    return name in self._arrives

  def end(self, name: str, now: float) -> float:
    """The time at which a copy is done, but not before `now`."""
    return max(now, self._arrives[name])
