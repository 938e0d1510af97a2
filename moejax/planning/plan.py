"""The plan of an experiment on a topology: memory, step time, and their breakdown."""

import dataclasses
from typing import Any

from moejax.config.experiment import Experiment
from moejax.config.fields import with_fields
from moejax.config.parameters import accepted_choices, flops_per_token_at, parameter_counts, tokens_per_step
from moejax.config.precision import Precision
from moejax.notebook import html_table
from moejax.planning.activations import buffer_factor, exchanges_rows
from moejax.planning.calibrated_chip import calibration_of
from moejax.planning.compile import Compiled, RefusedError, compile_step
from moejax.planning.cost import Cost, HostTraffic, PricedCollective, Received, cost
from moejax.planning.estimate import estimate
from moejax.planning.interval import interval
from moejax.planning.largest_arrays import LargeArray, largest_arrays
from moejax.planning.program import DataDependentLoopError, parse
from moejax.planning.topology import Topology
from moejax.progress import SILENT, Progress

ROUTER_LOAD = 1.7
"""The load of the busiest device, divided by the mean, for which plans price dropless layers unless another is given.

It is the mean of what routers of moejax have after training, with 8 or 16 experts on 8 devices: 1.3 to 2.0 in the
dropless member of `moejax compare ds_moe_mini` (3 seeds), 1.6 to 2.2 in the sparse members of `moejax compare
quickstart` (6 runs)."""

SHOWN_OPERATIONS = 10
"""Number of the most expensive operations that a plan lists."""

OPERANDS = {
  "qkv": "attention", "attention_out": "attention", "feed_forward": "feed_forward", "shared_experts": "feed_forward",
  "experts": "experts", "logits": "logits",
}  # fmt: skip
"""Scopes of products with weights, and the field of model.precision that sets the type of their operands."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedOperation:
  """All operations of one kind in one scope and pass, of one device."""

  scope: str
  of_pass: str
  """One of forward, recompute, backward and update."""
  kind: str
  """One of matrix, vector and memory, or the name of a kernel."""
  time_s: float
  fraction: float
  """Fraction of the step time."""
  flops: float
  count: int
  source: str = ""
  """The source line of its largest part, such as `models/moe/router.py:120`. Empty if the program has none."""

  def to_json(self) -> dict[str, Any]:
    """Plain values with the keys of `moejax plan --json`."""
    values = dataclasses.asdict(self)
    return values | {"pass": values.pop("of_pass"), "part": values.pop("fraction")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedCollective:
  """All collectives of one scope, kind and mesh axis, of one device."""

  axis: str
  kind: str
  scope: str
  devices: int
  """Number of devices in a group."""
  count: int
  bytes: float
  """Total bytes."""
  bandwidth_bytes_per_s: float
  time_s: float
  exposed_s: float
  """The part of time_s that does not overlap with computation."""

  @property
  def overlapped(self) -> bool:
    """Whether at least half of the time overlaps with computation."""
    return self.exposed_s < 0.5 * self.time_s

  def to_json(self) -> dict[str, Any]:
    """Plain values with the keys of `moejax plan --json`."""
    return dataclasses.asdict(self) | {"overlapped": self.overlapped}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The predicted cost of one training step, in bytes, FLOPs and seconds. Nothing is measured."""

  experiment: Experiment
  """The experiment with a complete mesh for the topology."""
  topology: Topology
  memory_bytes: dict[str, int]
  """Bytes on one device: arguments, temporaries, output, code and total. Only the total if the program does not fit."""
  compile_time_s: float
  """Seconds of the compilation, also if the program comes from the cache."""
  cached: bool
  """Whether the program was found in the cache."""
  step_time_s: float
  """Of the compiled program; by the formula of `moejax.planning.estimate` where the compiler found no room for it. The
  three fields below are None there."""
  executed_flops_per_device: float | None
  """FLOPs of the matrix units, including recomputation and dispatch masks."""
  breakdown_s: dict[str, float] | None
  """Seconds by resource: matrix, vector, memory, collective_exposed, host_exposed and the overhead of a step that the
  user measured. They add up to the step time."""
  kernel_s: float | None
  """The part of matrix that is priced by a roofline, because the compiler has no estimate for kernels."""
  operations: tuple[PlannedOperation, ...] = ()
  """The most expensive ones first."""
  collectives: tuple[PlannedCollective, ...] = ()
  """The most expensive ones first."""
  largest_arrays: tuple[LargeArray, ...] = ()
  """The largest arrays that the program computes."""
  beyond_memory: bool = False
  """Whether the compiler was asked for a program that it rejects for lack of memory."""
  host: HostTraffic | None = None
  """Copies to and from the host. None where the compiler found no room."""
  router_load: float | None = None
  """The load of the busiest device, divided by the mean, with which dropless layers that exchange rows are priced. None
  if there are none."""

  @property
  def tokens_per_step(self) -> int:
    return tokens_per_step(self.experiment)

  @property
  def model_flops_per_step(self) -> int:
    """FLOPs of the model for the choices that are accepted at the balanced load."""
    return model_flops_per_step(self.experiment)

  @property
  def hbm_bytes_per_device(self) -> int:
    return self.memory_bytes["total"]

  @property
  def hbm_limit_bytes(self) -> int:
    return self.topology.chip.hbm_bytes

  @property
  def refused(self) -> bool:
    """Whether the compiler rejected the program for lack of memory."""
    return self.breakdown_s is None

  @property
  def fits(self) -> bool:
    """Whether the program fits in device memory. On TPU, the compiler rejects programs that do not fit. Compilers for
    GPU and CPU accept every program, so the peak memory that they report is compared with the limit."""
    accepted = not self.refused and not self.beyond_memory
    return accepted and (self.topology.chip.platform == "tpu" or self.hbm_bytes_per_device <= self.hbm_limit_bytes)

  @property
  def moments_by_formula(self) -> bool:
    """Whether memory and copies of moments on the host are computed from a program that has them on the device."""
    return self.experiment.optimizer.offload_moments and self.topology.chip.platform == "gpu"

  @property
  def step_time_interval_s(self) -> tuple[float, float]:
    """The 80 % prediction interval of the step time."""
    return interval(self.step_time_s, self.topology.chip, self.experiment.model.moe is not None, self.refused)

  @property
  def memory_by_group(self) -> dict[str, float]:
    """Bytes on one device of parameters, gradients, moments, activations, gathered weights, exchange buffers and
    logits, by formula."""
    return estimate(self.experiment, self.topology).memory_by_group

  @property
  def tokens_per_s(self) -> float:
    return self.tokens_per_step / self.step_time_s

  @property
  def mfu(self) -> float | None:
    """Model FLOPs per second divided by the peak of all devices. None if either is unknown."""
    peak = self.topology.chip.bfloat16_flops
    if not peak:
      return None
    return self.model_flops_per_step / (self.step_time_s * self.topology.devices * peak)

  def __repr__(self) -> str:
    return (
      f"Plan({self.experiment.name!r}, {self.topology.name!r}, fits={self.fits}, step_time_s={self.step_time_s:.4g})"
    )

  def _repr_html_(self) -> str:
    shown = ("fits", "step_time_s", "tokens_per_s", "mfu", "hbm_bytes_per_device", "hbm_limit_bytes", "compile_time_s")
    values = self.to_json()
    return html_table(f"{self.experiment.name} on {self.topology.name}", [(name, values[name]) for name in shown])

  def to_json(self) -> dict[str, Any]:
    """The content of `moejax plan NAME --json FILE`. Keys include units."""
    parameters, calibration = parameter_counts(self.experiment.model), calibration_of(self.topology.chip)
    return {
      "experiment": self.experiment.name,
      "topology": self.topology.name,
      "slices": self.topology.slices,
      "devices": self.topology.devices,
      "mesh": self.experiment.mesh.shape,
      "remat": self.experiment.model.remat,
      "save_activations": list(self.experiment.model.save_activations),
      "tokens_per_step": self.tokens_per_step,
      "parameters_total": parameters.total,
      "parameters_active": parameters.active,
      "model_flops_per_step": self.model_flops_per_step,
      "executed_flops_per_device": self.executed_flops_per_device,
      "hbm_bytes_per_device": self.hbm_bytes_per_device,
      "hbm_limit_bytes": self.hbm_limit_bytes,
      "memory_bytes": self.memory_bytes,
      "memory_by_group": {name: round(size) for name, size in self.memory_by_group.items()},
      "largest_arrays": [array.to_json() for array in self.largest_arrays],
      "fits": self.fits,
      "router_load": self.router_load,
      "step_time_s": self.step_time_s,
      "step_time_interval_s": list(self.step_time_interval_s),
      "step_time_source": "formula" if self.refused else "program",
      "tokens_per_s": self.tokens_per_s,
      "mfu": self.mfu,
      "breakdown_s": self.breakdown_s,
      "kernel_s": self.kernel_s,
      "host": self.host and dataclasses.asdict(self.host),
      "moments_by_formula": self.moments_by_formula,
      "operations": [operation.to_json() for operation in self.operations[:SHOWN_OPERATIONS]],
      "collectives": [collective.to_json() for collective in self.collectives],
      "calibration": None if calibration is None else dataclasses.asdict(calibration),
      "compile_time_s": self.compile_time_s,
      "cached": self.cached,
    }


def plan(
  experiment: Experiment,
  topology: Topology,
  progress: Progress = SILENT,
  beyond_memory: bool = False,
  load: float = ROUTER_LOAD,
) -> Plan:
  """Compiles the training step of an experiment for a topology and computes its cost.

  Args:
    experiment: its step is planned.
    topology: the devices.
    progress: receives progress reports.
    beyond_memory: whether a program that does not fit in memory is compiled too.
    load: the load of the busiest device, divided by the mean, in dropless layers that exchange rows.

  Raises:
    UserError: If the step cannot be compiled (see `compile_step`).
  """
  compiled = compile_step(experiment, topology, progress, beyond_memory)
  progress.stage("reading the program")
  return plan_of(compiled, topology, load=load)


def model_flops_per_step(experiment: Experiment) -> int:
  """FLOPs of the model in one step for the choices that are accepted at the balanced load: no recomputation, no
  dispatch masks, no padding, no dropped choices. Attention counts in full, as in
  `moejax.config.parameters.flops_per_token`."""
  per_token = flops_per_token_at(experiment.model, experiment.data.sequence_length, accepted_choices(experiment))
  return round(tokens_per_step(experiment) * per_token)


def plan_of(
  compiled: Compiled, topology: Topology, precision: Precision | None = None, load: float = ROUTER_LOAD
) -> Plan:
  """The plan of a compiled step, with dropless layers at a load of the busiest device, or at that for which its receive
  buffer has room if that is less.

  With `precision`, products that have the compute type in the program are priced in its types.

  Raises:
    RefusedError: If the program has a loop whose length depends on the data.
  """
  own = compiled.experiment.model.precision
  precision = precision or own
  # What the compiled program computes with 8 bits is priced as such already.
  bits = {scope: getattr(precision, kind) for scope, kind in OPERANDS.items() if getattr(own, kind) == "compute"}
  received = received_rows(compiled.experiment, load)
  program = parse(compiled.text) if compiled.text else None
  try:
    found = cost(program, compiled.network, bits, received, compiled.moments_bytes) if program else None
  except DataDependentLoopError as error:
    raise RefusedError(
      f"the program of {compiled.experiment.name} for {topology.name} has a loop whose length depends on the data "
      f"({error}), which cannot be priced; use model.moe.dispatch einsum, or a TPU or GPU topology"
    ) from error
  return Plan(
    experiment=compiled.experiment,
    topology=topology,
    memory_bytes=compiled.memory,
    compile_time_s=compiled.compile_time_s,
    cached=compiled.cached,
    step_time_s=found.step_time_s if found else _by_formula(compiled.experiment, topology, precision),
    executed_flops_per_device=found.flops if found else None,
    breakdown_s=found.breakdown_s if found else None,
    kernel_s=found.kernel_s if found else None,
    operations=_operations(found) if found else (),
    collectives=tuple(_collective(group) for group in _grouped(found)) if found else (),
    largest_arrays=largest_arrays(program) if program else (),
    beyond_memory=compiled.beyond_memory,
    host=found.host if found else None,
    router_load=received.load if exchanges_rows(compiled.experiment) else None,
  )


def _by_formula(experiment: Experiment, topology: Topology, precision: Precision) -> float:
  """Seconds of a step with products in these types."""
  return estimate(with_fields(experiment, {"model.precision": precision}), topology).step_time_s


def received_rows(experiment: Experiment, load: float) -> Received:
  """The rows that the busiest device receives at this load, or at that for which its receive buffer has room if that is
  less."""
  room = buffer_factor(experiment)
  return Received(min(load, room), room) if exchanges_rows(experiment) else Received()


def _operations(found: Cost) -> tuple[PlannedOperation, ...]:
  return tuple(
    PlannedOperation(
      scope=operation.scope,
      of_pass=operation.of_pass,
      kind=operation.kind,
      time_s=operation.time_s,
      fraction=operation.time_s / found.step_time_s,
      flops=operation.flops,
      count=operation.count,
      source=operation.source,
    )
    for operation in found.operations
  )


def _grouped(found: Cost) -> list[list[PricedCollective]]:
  """Groups collectives by scope, kind and axis. The most expensive group is first."""
  groups: dict[tuple[str, str, str], list[PricedCollective]] = {}
  for priced in found.collectives:
    moved = priced.collective
    groups.setdefault((priced.scope, moved.kind, moved.axis), []).append(priced)
  return sorted(groups.values(), key=lambda group: -sum(priced.time_s for priced in group))


def _collective(group: list[PricedCollective]) -> PlannedCollective:
  moved = group[0].collective
  return PlannedCollective(
    axis=moved.axis,
    kind=moved.kind,
    scope=group[0].scope,
    devices=moved.devices,
    count=sum(priced.count for priced in group),
    bytes=sum(priced.count * priced.collective.bytes for priced in group),
    bandwidth_bytes_per_s=moved.bandwidth,
    time_s=sum(priced.time_s for priced in group),
    exposed_s=sum(priced.exposed_s for priced in group),
  )
