"""A user's own measurements of a chip, in a file that `--calibration` names, and the constants that follow from them.

The file has, for each chip, operations that `moejax calibrate` timed on one device, and train steps that
`moejax plan --against` compared with their plans. Efficiencies are predicted divided by measured time: by kind of
operation from the operations, times one factor for all kinds from the steps.
"""

import dataclasses
import math
import pathlib
import statistics
import typing
from typing import Any

from moejax.config.chips import CHIPS, Chip
from moejax.config.plain import from_plain, typed
from moejax.errors import UserError
from moejax.files import read_json, write_json
from moejax.notebook import html_table
from moejax.planning.calibrated_chip import Calibration, with_calibration
from moejax.planning.interval import half_width
from moejax.planning.topology import Topology

FORMAT = 1

KINDS = ("matrix", "kernel", "memory")
SHORTEST_S, LONGEST_S = 1e-9, 1e6
"""Limits of a measured or predicted time."""

LINK = "link"
"""The kind of an operation between devices. It has no part in the factor that measured steps give."""

ENOUGH = 4
"""The fewest runs whose errors give an interval: with fewer, no quantile of them covers 80 %."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedOperation:
  """One operation, as predicted at full efficiency and as measured on one device."""

  name: str
  kind: str
  """One of KINDS, what takes most of its predicted time, or LINK."""
  predicted_s: float
  measured_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedStep:
  """One train step beside its plan."""

  experiment: str
  topology: str
  slices: int
  mesh: dict[str, int]
  matrix_s: float
  """This and the next two: predicted seconds at full efficiency."""
  kernel_s: float
  memory_s: float
  """Of the vector units and of copies."""
  exposed_s: float
  """Predicted seconds of exposed collectives."""
  predicted_s: float
  """The step time as it was predicted before this measurement was known."""
  measured_s: float

  def is_of_same_program(self, other: "TimedStep") -> bool:
    """Whether both are of one program, so that the later measurement replaces the earlier one."""
    what = (self.experiment, self.topology, self.slices, self.mesh)
    parts = [(self.exposed_s, other.exposed_s), *((getattr(self, f"{k}_s"), getattr(other, f"{k}_s")) for k in KINDS)]
    return what == (other.experiment, other.topology, other.slices, other.mesh) and all(
      math.isclose(*pair, rel_tol=1e-6) for pair in parts
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurements:
  """What the user has measured on one kind of chip."""

  operations: tuple[TimedOperation, ...] = ()
  overhead_s: float = 0.0
  """Seconds of a step that does nothing."""
  steps: tuple[TimedStep, ...] = ()

  def calibration(self, chip: Chip) -> Calibration:
    """The constants that follow. A kind that was not measured has the mean of those that were, or the chip's own."""
    by_kind = {
      kind: statistics.geometric_mean(of_kind)
      for kind in (*KINDS, LINK)
      if (of_kind := [one.predicted_s / one.measured_s for one in self.operations if one.kind == kind])
    }
    link = by_kind.pop(LINK, 1.0)
    other = statistics.geometric_mean(by_kind.values()) if by_kind else chip.efficiency
    operations = Calibration(
      matrix=by_kind.get("matrix", other),
      kernel=by_kind.get("kernel", other),
      memory=by_kind.get("memory", other),
      link=link,
      # At most half of what a measured step has time for: a busy host takes longer to start a step than to wait for it.
      overhead_s=min([self.overhead_s, *((step.measured_s - step.exposed_s) / 2 for step in self.steps)]),
    )
    if not self.steps:
      return operations
    factors = [math.log(_factor(step, operations)) for step in self.steps]
    factor = math.exp(statistics.fmean(factors))
    return Calibration(
      matrix=factor * operations.matrix,
      kernel=factor * operations.kernel,
      memory=factor * operations.memory,
      link=operations.link,
      overhead_s=operations.overhead_s,
      runs=len(factors),
      half_width=half_width(_left_out(factors)) if len(factors) >= ENOUGH else None,
    )


def _factor(step: TimedStep, calibration: Calibration) -> float:
  """What all efficiencies must be multiplied by for the plan to have the measured time."""
  computed_s = sum(getattr(step, f"{kind}_s") / calibration.of(kind) for kind in KINDS)
  return computed_s / (step.measured_s - step.exposed_s - calibration.overhead_s)


def _left_out(values: list[float]) -> list[float]:
  """The difference of each value from the mean of the others."""
  total, count = sum(values), len(values)
  return [value - (total - value) / (count - 1) for value in values]


@dataclasses.dataclass(frozen=True)
class Calibrated:
  """A chip, what was measured on it, and the file with the measurements."""

  chip: Chip
  measurements: Measurements
  file: pathlib.Path

  @property
  def calibration(self) -> Calibration:
    """The constants that plans use."""
    return self.measurements.calibration(self.chip)

  def _repr_html_(self) -> str:
    return html_table(f"{self.chip.name}, {self.file}", list(dataclasses.asdict(self.calibration).items()))


def calibrated(topology: Topology, path: pathlib.Path | None, to_record: bool = False) -> Topology:
  """The topology with its chip as calibrated by a file, or as it is without a file.

  Args:
    topology: its chip is to be calibrated.
    path: the file of measurements.
    to_record: whether the file may be missing or have no measurements of the chip, since some are to be added.

  Raises:
    UserError: the file is missing or damaged, or has no measurements of the chip.
  """
  if path is None or (to_record and not path.exists()):
    return topology
  chip = topology.chip
  found = read(path).get(chip.name)
  if found is None and to_record:
    return topology
  if found is None:
    raise UserError(
      f"--calibration {path} has no measurements of {chip.name}; `moejax calibrate --out {path}` on such a device, or "
      "--against with a measured step time, adds some"
    )
  return dataclasses.replace(topology, chip=with_calibration(chip, found.calibration(chip)))


def add_operations(
  path: pathlib.Path, chip: Chip, operations: tuple[TimedOperation, ...], overhead_s: float
) -> Calibrated:
  """Writes the operations of a chip to a file, in place of earlier ones.

  Raises:
    UserError: the file is damaged.
  """
  chips = read(path) if path.exists() else {}
  before = chips.get(chip.name, Measurements())
  chips[chip.name] = dataclasses.replace(before, operations=operations, overhead_s=overhead_s)
  _write(path, chips)
  return Calibrated(chip, chips[chip.name], path)


def add_step(path: pathlib.Path, chip: Chip, step: TimedStep) -> Calibrated:
  """Adds a step to a file, in place of an earlier one of the same program.

  Raises:
    UserError: the file is damaged, or the step is shorter than what its plan has beside computation.
  """
  chips = read(path) if path.exists() else {}
  before = chips.get(chip.name, Measurements())
  if step.measured_s <= step.exposed_s:
    raise UserError(
      f"--against {step.measured_s:g} s leaves no time for computation: exposed collectives alone take "
      f"{step.exposed_s:.3g} s in this plan, so that it cannot calibrate {chip.name}; leave out --calibration"
    )
  others = tuple(one for one in before.steps if not one.is_of_same_program(step))
  chips[chip.name] = dataclasses.replace(before, steps=(*others, step))
  _write(path, chips)
  return Calibrated(chip, chips[chip.name], path)


def read(path: pathlib.Path) -> dict[str, Measurements]:
  """The measurements in a file, by the name of the chip.

  Raises:
    UserError: it cannot be read, or it is not such a file.
  """
  try:
    content = read_json(path)
    if content["format"] != FORMAT:
      raise ValueError(f"format {content['format']!r}, not {FORMAT}")
    return {_known(name): _measurements(values) for name, values in content["chips"].items()}
  except OSError as error:
    raise UserError(f"--calibration {path}: {error.strerror}; `moejax calibrate --out {path}` writes it") from error
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise UserError(f"{path} is not a file of `moejax calibrate`: {error}; use another file") from error


def _known(name: str) -> str:
  if name not in CHIPS:
    raise ValueError(f"unknown chip {name!r}")
  return name


def _measurements(values: dict[str, Any]) -> Measurements:
  found = Measurements(
    operations=tuple(from_plain(TimedOperation, one, "operations") for one in values["operations"]),
    overhead_s=typed(float, values["overhead_s"], "overhead_s"),
    steps=tuple(_step(one) for one in values["steps"]),
  )
  times = [time for one in found.operations for time in (one.predicted_s, one.measured_s)]
  for step in found.steps:
    times += [sum(getattr(step, f"{kind}_s") for kind in KINDS), step.predicted_s, step.measured_s - step.exposed_s]
  if not all(SHORTEST_S <= time <= LONGEST_S for time in times):
    raise ValueError(f"a time is not between {SHORTEST_S:g} and {LONGEST_S:g} s")
  parts = [found.overhead_s, *(getattr(step, f"{part}_s") for step in found.steps for part in (*KINDS, "exposed"))]
  if not all(0 <= part <= LONGEST_S for part in parts):
    raise ValueError(f"a time is not between 0 and {LONGEST_S:g} s")
  if any(one.kind not in (*KINDS, LINK) for one in found.operations):
    raise ValueError(f"a kind of operation is none of {', '.join((*KINDS, LINK))}")
  return found


def _step(values: dict[str, Any]) -> TimedStep:
  hints = typing.get_type_hints(TimedStep)
  mesh = {axis: typed(int, size, f"steps.mesh.{axis}") for axis, size in values["mesh"].items()}
  others = {name: typed(hints[name], value, f"steps.{name}") for name, value in values.items() if name != "mesh"}
  return TimedStep(mesh=mesh, **others)


def _write(path: pathlib.Path, chips: dict[str, Measurements]) -> None:
  write_json(path, {"format": FORMAT, "chips": {name: dataclasses.asdict(of) for name, of in sorted(chips.items())}})
