"""The measured time of each part of a profiled training step beside its predicted time."""

import dataclasses
import gzip
import pathlib
import re
import zlib
from typing import Any

import jax
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moejax.config.chips import CHIPS, Chip, chip_of
from moejax.config.experiment import Experiment
from moejax.errors import UserError, reason
from moejax.files import read_json, write_json
from moejax.partitioning import make_partitioner, present_devices
from moejax.planning.collectives import Network, collective_kind
from moejax.planning.cost import Cost, cost, scope_nearby, scope_of
from moejax.planning.devices import network, present_torus
from moejax.planning.measured_run import read_measured_run
from moejax.planning.plan import ROUTER_LOAD, received_rows
from moejax.planning.program import DataDependentLoopError, Program, parse
from moejax.planning.topology import Topology
from moejax.planning.trace import divided_ns, newest_trace, read_events
from moejax.terminal import Fitting
from moejax.training.profile import FOLDER, PROGRAM, STEPS
from moejax.training.run_directory import read_experiment

TABLE = "operations.json"
"""The file beside the trace with the content of the table."""

NOTHING = ("no operation", "")
"""The part of the step in which a device runs no operation of the program."""

CALLS = (
  "calls", "to_apply", "body", "condition", "branch_computations", "true_computation", "false_computation",
)  # fmt: skip

Key = tuple[str, str]
"""Scope, and pass or kind of collective."""


@dataclasses.dataclass(frozen=True)
class Part:
  """All operations in one scope and pass, or all collectives of one scope and kind, per step and device."""

  scope: str
  of_pass: str
  """One of forward, recompute, backward and update, or the kind of a collective."""
  measured_s: float
  """Seconds in which the device ran them, mean over the devices of the trace. Collectives have only the time in which
  nothing else ran, and the sum over all parts is the step time."""
  predicted_s: float | None
  """None without a prediction."""

  def to_json(self) -> dict[str, Any]:
    values = dataclasses.asdict(self)
    ratio = self.predicted_s / self.measured_s if self.predicted_s is not None and self.measured_s else None
    return values | {"pass": values.pop("of_pass"), "predicted_over_measured": ratio}


@dataclasses.dataclass(frozen=True)
class Profile:
  """A profiled step."""

  folder: pathlib.Path
  """It holds the trace."""
  experiment: Experiment
  first_step: int
  steps: int
  step_time_s: float
  """Measured with the profiler, which slows down short operations."""
  parts: tuple[Part, ...]
  """The longest ones first."""
  operations: dict[str, float]
  """Measured seconds per step of each operation, by its name in the program and the trace."""
  predicted_s: float | None
  """The predicted step time."""
  without_prediction: str
  """Why there is no prediction. Empty if there is one."""

  def to_json(self) -> dict[str, Any]:
    """Plain values: the content of operations.json."""
    return {
      "experiment": self.experiment.name,
      "first_step": self.first_step,
      "steps": self.steps,
      "step_time_s": self.step_time_s,
      "predicted_s": self.predicted_s,
      "without_prediction": self.without_prediction or None,
      "parts": [part.to_json() for part in self.parts],
      "operations_s": self.operations,
    }

  def __rich__(self) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="time by scope", title_justify="left")
    for head in ("scope", "pass", "measured, ms", "predicted, ms", "ratio"):
      table.add_column(head, justify="left" if head in ("scope", "pass") else "right", no_wrap=True)
    for part in self.parts:
      table.add_row(part.scope, part.of_pass, *_cells(part.measured_s, part.predicted_s))
    table.add_row("step", "", *_cells(self.step_time_s, self.predicted_s), style="bold")
    last = self.first_step + self.steps - 1
    lines = [f"steps {self.first_step} to {last} are profiled in {self.folder}, for XProf and ui.perfetto.dev"]
    lines += [self.without_prediction] if self.without_prediction else []
    return Group(Fitting(table), *map(Text, lines))


def _cells(measured_s: float, predicted_s: float | None) -> tuple[str, str, str]:
  ratio = "" if predicted_s is None or not measured_s else f"{predicted_s / measured_s:.2f}"
  return f"{measured_s * 1e3:,.2f}", "" if predicted_s is None else f"{predicted_s * 1e3:,.2f}", ratio


def write_profile(directory: pathlib.Path) -> Profile:
  """Reads the trace of a finished run, predicts the same program for the devices of this process, and writes both to
  operations.json beside the trace.

  Raises:
    UserError: If the run has no trace, or a file is damaged.
  """
  folder, experiment = directory / FOLDER, read_experiment(directory)
  file = newest_trace(folder)
  try:
    text = gzip.decompress((folder / PROGRAM).read_bytes()).decode()
    traced = read_json(folder / STEPS)
    steps, step_time_s = traced["steps"], traced["step_time_s"]
  except (OSError, ValueError, LookupError, TypeError, EOFError, zlib.error) as error:
    raise UserError(f"{folder} is damaged ({reason(error)[:100]}); train with --profile STEPS again") from error
  program = parse(text)
  operations = measured_s(program, file, _module(text), steps)
  found, why = _predicted(program, experiment, directory)
  measured: dict[Key, float] = {NOTHING: max(0.0, step_time_s - sum(operations.values()))}
  keys = {name: key_of(program, name) for name in operations}
  for name, seconds in operations.items():
    measured[keys[name]] = measured.get(keys[name], 0.0) + seconds
  predicted = by_part(found) if found else {}
  parts = [
    Part(*key, measured.get(key, 0.0), predicted.get(key, 0.0) if found else None) for key in {**measured, **predicted}
  ]
  profile = Profile(
    folder=folder,
    experiment=experiment,
    first_step=traced["first_step"],
    steps=steps,
    step_time_s=step_time_s,
    parts=tuple(sorted(parts, key=lambda part: (-part.measured_s, -(part.predicted_s or 0.0)))),
    operations=operations,
    predicted_s=found.step_time_s if found else None,
    without_prediction=why,
  )
  write_json(folder / TABLE, profile.to_json())
  return profile


def measured_s(program: Program, file: pathlib.Path, module: str, steps: int) -> dict[str, float]:
  """Seconds per step of each operation in a trace of `steps` steps, mean over the devices, the longest first.

  Raises:
    UserError: If the trace has no operation of the program.
  """
  devices = read_events(file, module)
  if not devices:
    raise UserError(f"{file} has no operations of {module}; the profiler does not support these devices")
  outer = _outer(program, {event.operation for events in devices.values() for event in events})
  collectives = {name for name, (_, instruction) in program.located.items() if collective_kind(program, instruction)}
  total: dict[str, float] = {}
  for events in devices.values():
    inner = [event for event in events if event.operation not in outer]
    for name, ns in divided_ns(inner, collectives).items():
      total[name] = total.get(name, 0.0) + ns * 1e-9 / steps / len(devices)
  return dict(sorted(total.items(), key=lambda item: -item[1]))


def _outer(program: Program, traced: set[str]) -> set[str]:
  """Operations, such as loops, whose parts the trace lists as well."""
  found = set()
  for name in traced & {*program.located}:
    called = program.located[name][1].called(*CALLS)
    parts = (part.name for computation in called for part in program.computations[computation].instructions)
    if not traced.isdisjoint(parts):
      found.add(name)
  return found


def key_of(program: Program, name: str) -> Key:
  """The part of the step that an operation with this name belongs to, as in `by_part`."""
  if name not in program.located:
    return "-", ""
  computation, instruction = program.located[name]
  kind = collective_kind(program, instruction)
  if kind is None:
    return scope_of(instruction, program)
  started = computation.by_name.get(instruction.operands[0]) if instruction.opcode.endswith("-done") else None
  return scope_nearby(computation, started or instruction, program), kind


def by_part(found: Cost) -> dict[Key, float]:
  """Predicted seconds of each part of a step. The sum is the step time."""
  seconds: dict[Key, float] = {NOTHING: found.breakdown_s["overhead"] + found.breakdown_s["host_exposed"]}
  for operation in found.operations:
    key = (operation.scope, operation.of_pass)
    seconds[key] = seconds.get(key, 0.0) + operation.time_s
  for priced in found.collectives:
    key = (priced.scope, priced.collective.kind)
    seconds[key] = seconds.get(key, 0.0) + priced.exposed_s
  return seconds


def _predicted(program: Program, experiment: Experiment, directory: pathlib.Path) -> tuple[Cost | None, str]:
  """The predicted cost of the program on the devices of this process, or None and the reason."""
  devices = present_devices()
  kind = devices[0].device_kind
  chip = CHIPS["cpu"] if devices[0].platform == "cpu" else chip_of(kind)
  if chip is None:
    return None, f"there is no prediction, because plans do not know device_kind={kind!r}"
  experiment = dataclasses.replace(experiment, mesh=experiment.mesh.resolve(len(devices)))
  load = ROUTER_LOAD
  if experiment.model.moe is not None and experiment.mesh.expert > 1:
    run = read_measured_run(directory, "--workdir")
    load = max(1.0, run.load(experiment.mesh.expert)) if run.loads else load
  try:
    return cost(program, _network(experiment, chip, devices), received=received_rows(experiment, load)), ""
  except DataDependentLoopError as error:
    return None, f"there is no prediction, because the program has a loop whose length depends on the data ({error})"


def _network(experiment: Experiment, chip: Chip, devices: list[jax.Device]) -> Network:
  """The devices of this program, in the mesh of the experiment."""
  here = Topology(chip.name, chip, present_torus(chip, devices), len(devices))
  return network(here, make_partitioner(experiment.mesh, experiment.rules, devices).mesh, experiment.mesh)


def _module(text: str) -> str:
  return (re.match(r"HloModule ([\w.\-]+)", text) or [""] * 2)[1]
