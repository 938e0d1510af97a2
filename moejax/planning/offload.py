"""What moving saved activations or optimizer moments to the memory of the host would free and cost, by formula.

The program that is planned keeps them on the device; this corrects its plan. Activations are written to the host in the
forward pass and read in the backward pass, both behind computation as far as it takes as long. Moments are read and
written, in both directions at once, while the update waits.
"""

import dataclasses
from typing import Any

from moejax.config.chips import Chip
from moejax.errors import UserError
from moejax.planning.estimate import estimate
from moejax.planning.plan import Plan

ACTIVATIONS, MOMENTS = "activations", "moments"

HOST_BANDWIDTH = {
  "v4": 16e9, "v5e": 16e9, "v5p": 16e9, "v6e": 32e9, "tpu7x": 16e9, "a100": 32e9, "h100": 64e9, "h200": 64e9,
  "b200": 64e9,
}  # fmt: skip
"""Bytes a second between the host and one device, each way. v4: jax-ml.github.io/scaling-book/tpus; taken for v5e, v5p
and a core of tpu7x too, and twice that for v6e. NVIDIA: PCIe of the fourth (A100) and fifth generation, data sheets."""

FORWARD = 1 / 3
"""Part of the step during which the forward pass runs."""

STAYING_LAYERS = 2
"""Layers whose activations are on the device at any time: that which is moved, and that which is computed."""


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
  check_offload(what, plan.topology.chip)
  estimated, model = estimate(plan.experiment, plan.topology), plan.experiment.model
  rate = HOST_BANDWIDTH[plan.topology.chip.name]
  freed = traffic = seconds = exposed_s = 0.0
  if ACTIVATIONS in what:
    saved = estimated.saved_activations
    one_way_s = saved * plan.experiment.training.gradient_accumulation / rate
    freed += saved * max(0.0, 1 - STAYING_LAYERS / model.num_layers)
    traffic += 2 * one_way_s * rate
    seconds += 2 * one_way_s
    exposed_s += max(0.0, one_way_s - FORWARD * plan.step_time_s)
    exposed_s += max(0.0, one_way_s - (1 - FORWARD) * plan.step_time_s)
  if MOMENTS in what:
    moments = estimated.memory_by_group["moments"]
    freed += moments
    traffic += 2 * moments
    seconds += moments / rate
    exposed_s += moments / rate
  return Offloaded(tuple(dict.fromkeys(what)), plan, freed, traffic, seconds, exposed_s)


def check_offload(what: list[str], chip: Chip) -> None:
  """Raises UserError if there is no such group of memory, or the device has no host of its own."""
  for group in what:
    if group not in (ACTIVATIONS, MOMENTS):
      raise UserError(f"--offload {group}: {ACTIVATIONS} and {MOMENTS} can move to the host; use one of them or both")
  if what and chip.name not in HOST_BANDWIDTH:
    raise UserError(f"--offload has no effect because {chip.name} uses the memory of its host; remove it")
