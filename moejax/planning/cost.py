"""Computes the time of a compiled program: the sum over all operations, multiplied by the trip counts of loops.

The operations of a computation run in the order in which the compiler scheduled them. They overlap with asynchronous
collectives, which share links, with copies between memories, which run one at a time, and with copies to and from the
host. Only the time that an operation waits for the result of a collective or of a copy is exposed.
"""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType

from moejax.config.precision import Operands
from moejax.planning.calibrated_chip import calibration_of, efficiency_of
from moejax.planning.collectives import Collective, Network, collective, rendezvous
from moejax.planning.flops import cublas_flops, matrix_flops, memory_bytes
from moejax.planning.host_copies import HostLink, exposed_by_formula, host_bandwidth, host_copy
from moejax.planning.kernels import (
  CUBLAS,
  GPU_CALLS,
  GROUPED_PRODUCTS,
  gpu_call,
  price,
  product_rate,
  product_speedup,
)
from moejax.planning.links import Links
from moejax.planning.program import Computation, Instruction, Program, trip_count

NO_WORK = frozenset({
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
  "opt-barrier", "iota", "domain", "add-dependency", "async-update", "recv", "send-done",
})  # fmt: skip
MOVES = frozenset({
  "copy", "transpose", "reshape", "broadcast", "concatenate", "pad", "slice", "dynamic-slice", "dynamic-update-slice",
  "gather", "scatter", "reverse", "bitcast", "parameter", "constant", "tuple", "get-tuple-element", "convert", "iota",
})  # fmt: skip
"""Operations that compute nothing. A fusion of only these is priced as memory traffic."""

SCOPES = (
  "embed", "norm", "qkv", "attention", "attention_out", "feed_forward", "router", "dispatch", "experts", "combine",
  "shared_experts", "attention_router", "depth_router", "multi_token", "logits", "loss", "optimizer",
)  # fmt: skip
"""Names of all scopes of the model and the training step (`jax.named_scope`)."""

BREAKDOWN = ("matrix", "vector", "memory", "collective_exposed", "host_exposed", "overhead")


@dataclasses.dataclass
class Operation:
  """All operations of one kind in one scope and pass."""

  scope: str
  of_pass: str
  """One of forward, recompute, backward and update."""
  kind: str
  """One of matrix, vector and memory, or the name of a kernel."""
  time_s: float = 0.0
  flops: float = 0.0
  count: int = 0
  by_source: dict[str, float] = dataclasses.field(default_factory=dict)
  """Seconds by source line."""

  @property
  def source(self) -> str:
    """The source line of the largest part. Empty if none is known."""
    known = {line: time_s for line, time_s in self.by_source.items() if line}
    return max(known, key=lambda line: known[line], default="")

  @property
  def resource(self) -> str:
    """Which part of BREAKDOWN it belongs to."""
    return "matrix" if self.kind.startswith("kernel") else self.kind


@dataclasses.dataclass
class PricedCollective:
  """All executions of one collective of the program."""

  scope: str
  collective: Collective
  count: int
  exposed_s: float

  @property
  def time_s(self) -> float:
    return self.count * self.collective.time_s


@dataclasses.dataclass
class HostTraffic:
  """Copies between a device and its host, in both directions."""

  bytes: float = 0.0
  time_s: float = 0.0
  """Seconds of all copies, one after the other."""
  exposed_s: float = 0.0
  """The part of the step during which the device waits for them."""


@dataclasses.dataclass(frozen=True)
class Received:
  """How many rows the busiest device receives in dropless layers, as multiples of the balanced load."""

  load: float = 1.0
  room: float = 1.0
  """Size of the receive buffer. Grouped products skip the rows that are not filled."""


@dataclasses.dataclass
class Cost:
  """The cost of one run of the program on one device."""

  step_time_s: float
  breakdown_s: dict[str, float]
  """Seconds by the names of BREAKDOWN. Kernels count as matrix."""
  flops: float
  operations: list[Operation]
  collectives: list[PricedCollective]
  kernel_s: float
  """Seconds of kernels, which are included in matrix and priced by a roofline, since the compiler has no estimate."""
  host: HostTraffic
  """Copies to and from the host."""


EVEN = Received()


def cost(
  program: Program,
  network: Network,
  bits: Mapping[str, Operands] = MappingProxyType({}),
  received: Received = EVEN,
  moments_bytes: int = 0,
) -> Cost:
  """The cost of a program on the chips of a network, from the compiler's cycle estimates where there are any.

  Args:
    program: what is priced.
    network: the chips that run it.
    bits: the types in which matrix products are priced, by scope; "compute" is that of the program.
    received: the rows that the busiest device receives.
    moments_bytes: bytes that come from the host and return while the update waits, beside what the program copies.
  """
  reader, chip = _Reader(program, network, bits, received), network.chip
  moments_s = moments_bytes / host_bandwidth(chip)
  reader.host = HostTraffic(2 * moments_bytes, 2 * moments_s, exposed_by_formula(0.0, moments_s, 0.0))
  reader.run(program.computations[program.entry], 1)
  operations = sorted(reader.operations.values(), key=lambda operation: -operation.time_s)
  collectives = sorted(reader.collectives.values(), key=lambda priced: -priced.time_s)
  seconds = dict.fromkeys(BREAKDOWN, 0.0)
  seconds |= {"collective_exposed": reader.exposed_s, "host_exposed": reader.host.exposed_s}
  for operation in operations:
    operation.time_s /= efficiency_of(chip, operation.kind)
    seconds[operation.resource] += operation.time_s
  calibration = calibration_of(chip)
  seconds["overhead"] = calibration.overhead_s if calibration else 0.0
  return Cost(
    step_time_s=sum(seconds.values()),
    breakdown_s=seconds,
    flops=sum(operation.flops for operation in operations),
    operations=operations,
    collectives=collectives,
    kernel_s=sum(operation.time_s for operation in operations if operation.resource != operation.kind),
    host=reader.host,
  )


class _Reader:
  """Traverses a program, each loop body once, and sums the costs."""

  def __init__(self, program: Program, network: Network, bits: Mapping[str, Operands], received: Received):
    self.program, self.network, self.chip, self.bits = program, network, network.chip, bits
    self.received = received
    self.exposed_s = 0.0
    self.host = HostTraffic()
    self.operations: dict[tuple[str, str, str], Operation] = {}
    self.collectives: dict[str, PricedCollective] = {}

  def run(self, computation: Computation, times: int) -> float:
    """Returns the seconds of a computation, and records its operations as executed `times` times."""
    clock = copies_free = 0.0
    links, host = Links(), HostLink(self.chip)
    begun: dict[str, str] = {}
    copies: dict[str, float] = {}
    for instruction in computation.instructions:
      opcode = instruction.opcode
      if opcode in NO_WORK:
        continue
      if opcode in ("while", "call", "conditional"):
        clock += self._nested(computation, instruction, times)
      elif (copied := host_copy(self.program, computation, instruction)) is not None:
        self.host.time_s += times * host.begin(instruction.name, copied, clock)
        self.host.bytes += times * copied.bytes
        if not opcode.endswith("-start"):
          clock = self._wait_for_host(host, instruction.name, clock, times)
      elif opcode.endswith("-done") and host.has(instruction.operands[0]):
        clock = self._wait_for_host(host, instruction.operands[0], clock, times)
      elif opcode == "copy-start":
        seconds = instruction.shapes[0].bytes / self.chip.hbm_bandwidth
        copies_free = max(copies_free, clock) + seconds
        copies[instruction.name] = copies_free
      elif opcode == "copy-done":
        waits = max(0.0, copies.get(instruction.operands[0], 0.0) - clock)
        clock += waits
        self._work(instruction, "memory", waits, 0.0, times)
      elif (key := self._started(instruction)) is not None:
        if (moved := self._exchange(computation, instruction, times)) is not None:
          links.begin(key, moved, clock)
          begun[key] = instruction.name
      elif (key := self._done(instruction)) is not None:
        arrives = links.end(key, clock)
        self._expose(begun.pop(key, ""), arrives - clock, times)
        clock = arrives
      elif not self._continues(instruction) and (moved := self._exchange(computation, instruction, times)) is not None:
        links.begin(instruction.name, moved, clock)
        arrives = links.end(instruction.name, clock)
        self._expose(instruction.name, arrives - clock, times)
        clock = arrives
      else:
        clock += self._compute(computation, instruction, times)
    return clock

  def _wait_for_host(self, host: HostLink, name: str, clock: float, times: int) -> float:
    """The time at which a copy to or from the host is done."""
    arrives = host.end(name, clock)
    self.host.exposed_s += times * (arrives - clock)
    return arrives

  def _nested(self, computation: Computation, instruction: Instruction, times: int) -> float:
    called = self.program.computations
    if instruction.opcode == "while":
      trips = trip_count(self.program, computation, instruction)
      return trips * self.run(called[instruction.called("body")[0]], times * trips)
    if instruction.opcode == "call":
      return self.run(called[instruction.called("to_apply", "calls")[0]], times)
    branches = instruction.called("branch_computations", "true_computation", "false_computation")
    parts = (self.program, self.network, self.bits, self.received)
    slowest = max(branches, key=lambda name: _Reader(*parts).run(called[name], 1))
    return self.run(called[slowest], times)

  def _started(self, instruction: Instruction) -> str | None:
    """The key of an asynchronous collective that this instruction starts, or None."""
    if instruction.opcode == "send":
      return rendezvous(instruction)
    if instruction.opcode.endswith("-start"):
      return instruction.name
    return self._part(instruction, "AsyncCollectiveStart")

  def _done(self, instruction: Instruction) -> str | None:
    if instruction.opcode == "recv-done":
      return rendezvous(instruction)
    if instruction.opcode.endswith("-done"):
      return instruction.operands[0]
    return self._part(instruction, "AsyncCollectiveDone")

  def _part(self, instruction: Instruction, target: str) -> str | None:
    """TPU's second form: fusions that start, continue and finish a collective. Its channel joins them."""
    inner = self.program.inner(instruction) if instruction.opcode == "fusion" else None
    if inner is None or inner.root.target != target:
      return None
    return next((f"channel {part.channel}" for part in inner.instructions if part.channel), None)

  def _continues(self, instruction: Instruction) -> bool:
    """Whether a fusion computes while a collective that was started before continues inside it."""
    return any(name.startswith("async_collective_fusion") for name in instruction.called("calls"))

  def _exchange(self, computation: Computation, instruction: Instruction, times: int) -> Collective | None:
    moved = collective(self.network, self.program, instruction)
    if moved is not None and moved.kind == "ragged-all-to-all":
      moved = self._at_load(computation, instruction, moved)
    if moved is not None and moved.devices > 1:
      scope = scope_nearby(computation, instruction, self.program)
      self.collectives[instruction.name] = PricedCollective(scope, moved, times, 0.0)
    return moved

  def _at_load(self, computation: Computation, instruction: Instruction, moved: Collective) -> Collective:
    """An exchange of rows between a buffer for the balanced load and a receive buffer, at the load."""
    sent = computation.by_name.get(instruction.operands[0])
    fraction = self.received.load * min(1.0, sent.bytes / moved.bytes if sent and moved.bytes else 1.0)
    return dataclasses.replace(moved, bytes=round(fraction * moved.bytes), time_s=fraction * moved.time_s)

  def _expose(self, name: str, seconds: float, times: int) -> None:
    if name in self.collectives:
      self.collectives[name].exposed_s += seconds * times
    self.exposed_s += seconds * times

  def _compute(self, computation: Computation, instruction: Instruction, times: int) -> float:
    """Seconds of one execution of an operation without communication."""
    if instruction.opcode == "custom-call" and instruction.target.startswith(CUBLAS):
      return self._gpu_product(computation, instruction, times)
    if instruction.opcode == "custom-call":
      return self._kernel(instruction, times)
    flops = matrix_flops(self.program, computation, instruction)
    seconds = self._seconds(computation, instruction, flops) / self._speedup(instruction, flops)
    kind = "matrix" if flops else "memory" if self._only_moves(instruction) else "vector"
    self._work(instruction, kind, seconds, flops, times)
    return seconds

  def _kernel(self, instruction: Instruction, times: int) -> float:
    """A kernel or a call of a library; markers and allocations take no time."""
    scope, of_pass = scope_of(instruction, self.program)
    bits = self.bits.get(scope, "compute")
    if instruction.target == "tpu_custom_call":
      priced = price(instruction, bits)
      name, flops, seconds = instruction.name, priced.flops, priced.seconds(self.chip)
      name = re.sub(r"(_segmented|_no_residuals|_residuals|\.\d.*$|\d+$)", "", name)  # as in gmm.2.clone
    elif self.chip.platform == "gpu" and instruction.target.startswith(GPU_CALLS):
      name, flops, seconds = gpu_call(instruction, self.chip, bits, of_pass)
      seconds = seconds if flops or instruction.estimated_s is None else instruction.estimated_s
    else:
      return 0.0
    if name in GROUPED_PRODUCTS:
      filled = self.received.load / self.received.room
      flops, seconds = filled * flops, filled * seconds
    self._work(instruction, f"kernel {name}", seconds, flops, times)
    return seconds

  def _gpu_product(self, computation: Computation, instruction: Instruction, times: int) -> float:
    """A call of cuBLAS: the longer of its FLOPs at the rate of its operand type and its bytes at the HBM bandwidth."""
    flops, dtype = cublas_flops(computation, instruction)
    moved = instruction.shapes[0].bytes + sum(
      computation.by_name[name].bytes for name in instruction.operands if name in computation.by_name
    )
    seconds = max(flops / product_rate(self.chip, dtype), moved / self.chip.hbm_bandwidth)
    seconds /= self._speedup(instruction, flops)
    self._work(instruction, "matrix", seconds, flops, times)
    return seconds

  def _seconds(self, computation: Computation, instruction: Instruction, flops: int) -> float:
    if instruction.cycles is not None and self.chip.clock_hz:
      return instruction.cycles / self.chip.clock_hz
    if instruction.estimated_s is not None and not flops:
      return instruction.estimated_s
    moved = memory_bytes(self.program, computation, instruction)
    rate = self.chip.bfloat16_flops or self.chip.vector_flops
    return max(flops / rate, moved / self.chip.hbm_bandwidth)

  def _speedup(self, instruction: Instruction, flops: float) -> float:
    bits = self.bits.get(scope_of(instruction, self.program)[0], "compute") if flops and self.bits else "compute"
    return 1.0 if bits == "compute" else product_speedup(self.chip, bits)

  def _only_moves(self, instruction: Instruction) -> bool:
    inner = self.program.inner(instruction) if instruction.opcode == "fusion" else None
    parts = inner.instructions if inner is not None else (instruction,)
    return all(part.opcode in MOVES for part in parts)

  def _work(self, instruction: Instruction, kind: str, seconds: float, flops: float, times: int) -> None:
    if not seconds:
      return
    scope, of_pass = scope_of(instruction, self.program)
    operation = self.operations.setdefault((scope, of_pass, kind), Operation(scope, of_pass, kind))
    operation.time_s += seconds * times
    operation.flops += flops * times
    operation.count += times
    source = self.program.source(instruction)
    operation.by_source[source] = operation.by_source.get(source, 0.0) + seconds * times


def scope_nearby(computation: Computation, instruction: Instruction, program: Program) -> str:
  """The scope of an operation. If it has none, as on SparseCores, the scope of the nearest operation that uses its
  result or, if there is none, of the nearest operation whose result it uses."""
  scope, _ = scope_of(instruction, program)
  for downward in (True, False):
    nearest, seen = [instruction], {instruction.name}
    while scope == "-" and nearest:
      linked = [one for found in nearest for one in _linked(computation, found, downward)]
      nearest = [one for one in dict.fromkeys(linked) if one.name not in seen]
      seen.update(one.name for one in nearest)
      scope = next((near for one in nearest if (near := scope_of(one, program)[0]) != "-"), "-")
  return scope


def _linked(computation: Computation, instruction: Instruction, downward: bool) -> list[Instruction]:
  """Operations that use the result of one, or those whose results it uses. A tuple that leaves the computation links
  unrelated operations, and is none of them."""
  if downward:
    return [
      user for user in computation.users.get(instruction.name, ()) if not (user.is_root and user.opcode == "tuple")
    ]
  if instruction.opcode in ("while", "parameter"):
    return []
  return [computation.by_name[name] for name in instruction.operands if name in computation.by_name]


def scope_of(instruction: Instruction, program: Program) -> tuple[str, str]:
  """The innermost scope of an operation, `-` if it has none, and its pass."""
  path = instruction.op_name
  if not path:
    inner = program.inner(instruction)
    path = next((part.op_name for part in reversed(inner.instructions) if part.op_name), "") if inner else ""
  words = re.split(r"[/()]", path)
  scope = next((word for word in reversed(words) if word in SCOPES), "-")
  if scope == "optimizer":
    return scope, "update"
  if "rematted_computation" in path:
    return scope, "recompute"
  return scope, "backward" if "transpose(" in path else "forward"
