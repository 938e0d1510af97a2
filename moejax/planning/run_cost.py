"""Estimates tokens, days, chip-hours, energy and cost of a whole training run from its plan."""

import dataclasses
from typing import Any

from moejax.config.parameters import full_sequence_steps
from moejax.errors import UserError
from moejax.planning.plan import Plan

DAY_S = 86_400


@dataclasses.dataclass(frozen=True)
class RunCost:
  """The cost of a run with the steps of the experiment or its budget, without input, checkpoints and interruptions."""

  steps: int
  tokens: int
  chips: int
  days: float
  days_interval: tuple[float, float]
  """80 % prediction interval in days, from that of the step time."""
  chip: str
  power_w: float | None
  """Power of a chip in watts, or None if none is published."""
  price_per_chip_hour: float | None
  """Price in any currency, or None if it is not given."""

  @property
  def chip_hours(self) -> float:
    return 24 * self.days * self.chips

  @property
  def cost(self) -> float | None:
    """Cost in the currency of the price."""
    return None if self.price_per_chip_hour is None else self.price_per_chip_hour * self.chip_hours

  @property
  def energy_kwh(self) -> float | None:
    """Energy of the chips, without hosts, network and cooling."""
    return None if self.power_w is None else self.chip_hours * self.power_w / 1000

  @property
  def summary(self) -> str:
    """One line with the cost of the run."""
    low, high = self.days_interval
    digits = ",.0f" if (self.cost or 0.0) >= 100 else ".3g"
    money = "" if self.cost is None else f", {self.cost:{digits}} at {self.price_per_chip_hour:g} per chip-hour"
    energy = (
      f"energy unknown (no published power of {self.chip})"
      if self.energy_kwh is None
      else f"{self.energy_kwh:,.3g} kWh at {self.power_w:g} W per chip"
    )
    return (
      f"whole run: {self.steps:,} steps, {self.tokens:.4g} tokens, {self.days:.3g} days ({low:.3g} to {high:.3g}), "
      f"{self.chip_hours:,.3g} chip-hours{money}, {energy}"
    )

  def to_json(self) -> dict[str, Any]:
    """Plain values, under the key `run` of `moejax plan --json`."""
    return dataclasses.asdict(self) | {
      "chip_hours": self.chip_hours,
      "energy_kwh": self.energy_kwh,
      "cost": self.cost,
    }


def run_cost(plan: Plan, price_per_chip_hour: float | None = None) -> RunCost:
  """Estimates the cost of the whole run of a planned experiment.

  Raises:
    UserError: If the price is negative.
  """
  if price_per_chip_hour is not None and not price_per_chip_hour >= 0:
    raise UserError(f"--price-per-chip-hour={price_per_chip_hour} must be 0 or above")
  steps = full_sequence_steps(plan.experiment)
  low, high = (steps * seconds / DAY_S for seconds in plan.step_time_interval_s)
  return RunCost(
    steps=steps,
    tokens=steps * plan.tokens_per_step,
    chips=plan.topology.count * plan.topology.slices,
    days=steps * plan.step_time_s / DAY_S,
    days_interval=(low, high),
    chip=plan.topology.chip.name,
    power_w=plan.topology.chip.power_w,
    price_per_chip_hour=price_per_chip_hour,
  )
