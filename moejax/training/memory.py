"""Checks that a program fits in device memory before it runs."""

import dataclasses
import pathlib
import re
import resource
from collections.abc import Sequence
from typing import Any

import jax

from moejax.errors import UserError
from moejax.host_memory import is_on_host
from moejax.partitioning import Partitioner


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes that a program needs on each device."""

  arguments: int
  """Bytes of its arguments: the state and the batch."""
  more: int
  """Additional bytes while it runs: temporaries, code, and outputs that do not reuse the arguments."""

  @property
  def total(self) -> int:
    return self.arguments + self.more


def program_memory(compiled: jax.stages.Compiled) -> Memory:
  """The memory of a program according to the compiler."""
  found = compiled.memory_analysis()
  assert found is not None
  placements = jax.tree.leaves(compiled.input_shardings)
  platform = next(iter(placements[0].device_set)).platform if placements else "cpu"
  return counted_memory(found, platform)


def counted_memory(found: Any, platform: str) -> Memory:
  """The peak memory, given the statistics of the compiler (`jax.stages.Compiled.memory_analysis`).

  Uses the peak that the compiler reports, which libtpu compares with its limit. The reported size of temporaries can
  include gaps between buffers. On CPU, the reported peak does not include temporaries.

  The reported peak also includes what is in the memory of the host. Arguments there are deducted. Activations there are
  not, because they need not be there when the device has its peak. The sum of temporaries and outputs does not include
  them, so that the smaller of the peak and this sum is an upper bound.
  """
  arguments, code = found.argument_size_in_bytes, found.generated_code_size_in_bytes
  summed = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
  peak = found.peak_memory_in_bytes - found.host_argument_size_in_bytes
  if platform == "cpu" or peak < arguments:
    return Memory(arguments, summed + code)
  more = peak - arguments
  return Memory(arguments, (min(more, summed) if found.host_temp_size_in_bytes else more) + code)


def argument_bytes(tree: object) -> int:
  """Bytes on each device of abstract arrays with shardings, without those in the memory of the host."""
  size = 0
  for leaf in jax.tree.leaves(tree):
    if is_on_host(leaf.sharding):
      continue
    elements = 1
    for length in leaf.sharding.shard_shape(leaf.shape):
      elements *= length
    size += elements * leaf.dtype.itemsize
  return size


def check_fits(what: str, needed: Memory, partitioner: Partitioner, remedy: str) -> None:
  """Raises UserError if a program needs more memory than a device has free.

  Args:
    what: name of the program, for the message.
    needed: memory on each device.
    partitioner: has the devices.
    remedy: advice, for the message.
  """
  free = free_bytes(partitioner)
  if free is None or needed.total <= free:
    return
  kind = partitioner.device.device_kind
  raise UserError(
    f"{what} needs {_gib(needed.total)} of memory on each device ({_gib(needed.arguments)} of arguments, "
    f"{_gib(needed.more)} while it runs), but {kind} has {_gib(free)} free; {remedy}"
  )


def check_together(members: Sequence[Memory], partitioner: Partitioner) -> None:
  """Raises UserError if programs do not fit together, when all keep their arguments and one runs at a time."""
  arguments = sum(member.arguments for member in members)
  needed = Memory(arguments, max(member.more for member in members))
  remedy = "compare fewer members at once, shrink them, or use more devices (mesh)"
  check_fits(f"measuring {len(members)} members in turn", needed, partitioner, remedy)


def free_bytes(partitioner: Partitioner) -> int | None:
  """Free bytes of each device of this process, or None if the device does not report them.

  CPU devices share the memory of the host.
  """
  local = partitioner.mesh.local_devices
  if partitioner.platform == "cpu":
    return available_host_bytes() // len(local)
  statistics = [device.memory_stats() for device in local]
  free = [each["bytes_limit"] - each.get("bytes_in_use", 0) for each in statistics if each and "bytes_limit" in each]
  return min(free, default=None)


def available_host_bytes() -> int:
  """Bytes of host memory that this process may still allocate, given free memory, control groups and resource
  limits."""
  meminfo = pathlib.Path("/proc/meminfo").read_text()
  available = [int(re.findall(r"MemAvailable:\s+(\d+) kB", meminfo)[0]) * 1024, *_control_groups()]
  soft, _ = resource.getrlimit(resource.RLIMIT_AS)
  if soft != resource.RLIM_INFINITY:
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    available.append(max(0, soft - used))
  return min(available)


def _control_groups(root: pathlib.Path = pathlib.Path("/sys/fs/cgroup")) -> list[int]:
  """Free bytes of each limited control group of this process, as in a container or a SLURM job."""
  left: list[int] = []
  mine = pathlib.Path("/proc/self/cgroup")
  for line in mine.read_text().splitlines() if mine.exists() else ():
    _, controllers, path = line.split(":", 2)
    if controllers in ("", "memory"):
      top = root / "memory" if controllers else root
      names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
      group = top / path.lstrip("/")
      for folder in (group, *group.parents):
        if folder.is_relative_to(top):
          left += _left(folder, *names)
  return left


def _left(group: pathlib.Path, limit: str, usage: str) -> list[int]:
  """Free bytes of a group, including its page cache. Empty if it has no limit."""
  try:
    most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
    cached = re.findall(r"^(?:total_)?inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
  except OSError:
    return []
  return [] if most == "max" else [max(0, int(most) - used + int(cached[-1] if cached else 0))]


def _gib(size: int) -> str:
  return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
