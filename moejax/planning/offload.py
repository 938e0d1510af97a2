"""What moving saved activations or optimizer moments to the memory of the host would free and cost, by formula.

The program that is planned keeps them on the device; this corrects its plan. With `model.offload_activations` and
`optimizer.offload_moments`, the program itself copies them, and its plan needs no correction.
"""

import dataclasses
from typing import Any

from moejax.config.chips import Chip
from moejax.config.experiment import Experiment
from moejax.errors import UserError
from moejax.planning.estimate import estimate
from moejax.planning.host_copies import HOST_BANDWIDTH, STAYING_LAYERS, exposed_by_formula
from moejax.planning.plan import Plan

ACTIVATIONS, MOMENTS = "activations", "moments"


@dataclasses.dataclass(frozen=True)
class Offloaded:
  """A plan with some of its memory on the host."""

  what: tuple[str, ...]
  """Of ACTIVATIONS and MOMENTS."""
  plan: Plan
  """The plan without offload."""
  freed_bytes: float
  """On one device."""
  traffic_bytes: float
  """Of one device and step, in both directions together."""
  traffic_s: float
  exposed_s: float
  """The part of traffic_s that no computation hides."""

  @property
  def hbm_bytes_per_device(self) -> float:
    return self.plan.hbm_bytes_per_device - self.freed_bytes

  @property
  def fits(self) -> bool:
    return self.hbm_bytes_per_device <= self.plan.hbm_limit_bytes

  @property
  def step_time_s(self) -> float:
    return self.plan.step_time_s + self.exposed_s

  @property
  def summary(self) -> str:
    """One line with the effect."""
    gib, limit = self.hbm_bytes_per_device / 2**30, self.plan.hbm_limit_bytes / 2**30
    return (
      f"with {' and '.join(self.what)} on the host, by formula: {gib:.1f} of {limit:.1f} GiB "
      f"({'fits' if self.fits else 'does not fit'}), {self.traffic_bytes / 2**30:.2f} GiB per step to and from the "
      "host, "
      f"{self.traffic_s:.3g} s of which {self.exposed_s:.3g} s exposed; step time {self.step_time_s:.4g} s"
    )

  def to_json(self) -> dict[str, Any]:
    """Plain values, under the key `offload` of `moejax plan --json`."""
    return {
      "what": list(self.what),
      "hbm_bytes_per_device": round(self.hbm_bytes_per_device),
      "fits": self.fits,
      "host_bytes_per_device": round(self.freed_bytes),
      "traffic_bytes": round(self.traffic_bytes),
      "traffic_s": self.traffic_s,
      "exposed_s": self.exposed_s,
      "step_time_s": self.step_time_s,
    }


def offloaded(plan: Plan, what: list[str]) -> Offloaded:
  """The plan with activations, moments or both on the host.

  Raises:
    UserError: as `check_offload`.
  """
  check_offload(what, plan.experiment, plan.topology.chip)
  estimated, model = estimate(plan.experiment, plan.topology), plan.experiment.model
  rate = HOST_BANDWIDTH[plan.topology.chip.name]
  saved = estimated.saved_activations if ACTIVATIONS in what else 0.0
  moments = estimated.memory_by_group["moments"] if MOMENTS in what else 0.0
  activations_s = saved * plan.experiment.training.gradient_accumulation / rate
  return Offloaded(
    tuple(dict.fromkeys(what)),
    plan,
    freed_bytes=saved * max(0.0, 1 - STAYING_LAYERS / model.num_layers) + moments,
    traffic_bytes=2 * (activations_s * rate + moments),
    traffic_s=2 * activations_s + moments / rate,
    exposed_s=exposed_by_formula(activations_s, moments / rate, plan.step_time_s),
  )


def check_offload(what: list[str], experiment: Experiment, chip: Chip) -> None:
  """Raises UserError if there is no such group of memory, the program itself moves it, or the device has no host of its
  own."""
  for group in what:
    if group not in (ACTIVATIONS, MOMENTS):
      raise UserError(f"--offload {group}: {ACTIVATIONS} and {MOMENTS} can move to the host; use one of them or both")
  if what and chip.name not in HOST_BANDWIDTH:
    raise UserError(f"--offload has no effect because {chip.name} uses the memory of its host; remove it")
  fields = {
    ACTIVATIONS: ("model.offload_activations", " ".join(experiment.model.offload_activations)),
    MOMENTS: ("optimizer.offload_moments", experiment.optimizer.offload_moments),
  }
  for group in what:
    field, value = fields[group]
    if value:
      raise UserError(f"--offload {group} would have no effect because {field}={value} does it; remove one of them")
