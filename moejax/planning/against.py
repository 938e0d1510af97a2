"""A measured step time beside its prediction."""

import dataclasses
import pathlib
from typing import Any

from moejax.config.experiment import Experiment
from moejax.errors import UserError
from moejax.planning.calibrated_chip import efficiency_of
from moejax.planning.calibration import TimedStep, add_step
from moejax.planning.measured_run import check_same_step, read_measured_run
from moejax.planning.plan import Plan
from moejax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Against:
  """A plan and the measured time of the step that it predicts."""

  plan: Plan
  measured_s: float
  recorded: pathlib.Path | None = None
  """The file of measurements that the step was added to."""

  @property
  def ratio(self) -> float:
    """Predicted time divided by measured time."""
    return self.plan.step_time_s / self.measured_s

  @property
  def within_interval(self) -> bool:
    """Whether the measured time is in the 80 % prediction interval."""
    low, high = self.plan.step_time_interval_s
    return low <= self.measured_s <= high

  @property
  def summary(self) -> str:
    """One line that compares the prediction with the measurement."""
    where = "within" if self.within_interval else "outside"
    added = f"; added to {self.recorded} to calibrate later plans" if self.recorded else ""
    added = "; not recorded, since the prediction is by formula" if self.plan.refused else added
    return (
      f"measured: {self.measured_s:.4g} s; the prediction is {self.ratio:.3f} times that, {where} its 80 % "
      f"interval{added}"
    )

  def to_json(self) -> dict[str, Any]:
    """Plain values, under the key `against` of `moejax plan --json`."""
    return {
      "measured_s": self.measured_s,
      "predicted_over_measured": self.ratio,
      "within_interval": self.within_interval,
      "recorded": None if self.recorded is None else str(self.recorded),
    }


def measured_step_s(measured: str, experiment: Experiment, topology: Topology) -> float:
  """The seconds that a text gives: a positive number, or the directory of a run, whose median step time counts.

  Raises:
    UserError: it is neither, or the run is of another model, batch or kind or number of devices.
  """
  try:
    seconds = float(measured)
  except ValueError:
    if not measured.strip() or not pathlib.Path(measured).is_dir():
      raise UserError(f"--against {measured} is neither a number of seconds nor the directory of a run") from None
    run = read_measured_run(pathlib.Path(measured), "--against")
    check_same_step(run, experiment, topology, "--against")
    return run.median_step_s("--against")
  if not 0 < seconds < float("inf"):
    raise UserError(f"--against {measured} must be a positive number of seconds")
  return seconds


def record_step(plan: Plan, measured_s: float, path: pathlib.Path | None) -> Against:
  """Compares a plan with a measured time, and adds both to a file of measurements if there is a path.

  A plan by formula has no parts to calibrate, and is not added.

  Raises:
    UserError: as `add_step`.
  """
  if path is None or plan.refused:
    return Against(plan, measured_s)
  chip = plan.topology.chip
  seconds = {"matrix": 0.0, "kernel": 0.0, "memory": 0.0}
  for operation in plan.operations:
    part = "kernel" if operation.kind.startswith("kernel") else "matrix" if operation.kind == "matrix" else "memory"
    seconds[part] += operation.time_s * efficiency_of(chip, operation.kind)
  assert plan.breakdown_s
  step = TimedStep(
    experiment=plan.experiment.name,
    topology=plan.topology.name,
    slices=plan.topology.slices,
    mesh=plan.experiment.mesh.shape,
    matrix_s=seconds["matrix"],
    kernel_s=seconds["kernel"],
    memory_s=seconds["memory"],
    exposed_s=plan.breakdown_s["collective_exposed"] + plan.breakdown_s["host_exposed"],
    predicted_s=plan.step_time_s,
    measured_s=measured_s,
  )
  add_step(path, chip, step)
  return Against(plan, measured_s, path)
