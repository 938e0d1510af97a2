"""A chip as its user has measured it."""

import dataclasses

from moejax.config.chips import Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """How fast a chip is where the user has measured it: predicted divided by measured time, by kind of operation."""

  matrix: float
  """Of matrix products."""
  kernel: float
  """Of kernels, which are priced by a roofline."""
  memory: float
  """Of the vector units and of copies."""
  link: float = 1.0
  """Of collectives between the devices of a host."""
  overhead_s: float = 0.0
  """Seconds of a step beside its operations and collectives."""
  runs: int = 0
  """Measured train steps that it is fitted to. With 0 it is of single operations."""
  half_width: float | None = None
  """Of the 80 % interval of the logarithm of a step time, by the errors of these runs; None if they are too few."""

  def of(self, kind: str) -> float:
    """The efficiency of one kind of operation: matrix, vector, memory or the name of a kernel."""
    if kind.startswith("kernel"):
      return self.kernel
    return self.matrix if kind == "matrix" else self.memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedChip(Chip):
  """A chip with the user's own measurements, in place of the efficiency that published runs have."""

  calibration: Calibration


def with_calibration(chip: Chip, calibration: Calibration) -> CalibratedChip:
  """The chip with this calibration and the bandwidth of its links as measured, in place of a calibration that it may
  have."""
  values = {field.name: getattr(chip, field.name) for field in dataclasses.fields(Chip)}
  before = calibration_of(chip)
  values["link_bandwidth"] *= calibration.link / (before.link if before else 1.0)
  return CalibratedChip(**values, calibration=calibration)


def calibration_of(chip: Chip) -> Calibration | None:
  """The user's own measurements of a chip, if there are any."""
  return chip.calibration if isinstance(chip, CalibratedChip) else None


def efficiency_of(chip: Chip, kind: str) -> float:
  """Predicted divided by measured time of one kind of operation: matrix, vector, memory or the name of a kernel."""
  calibration = calibration_of(chip)
  return calibration.of(kind) if calibration else chip.efficiency
