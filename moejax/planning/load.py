"""Plans with an unbalanced router: time and memory of the busiest device, or the fraction of dropped choices.

A load is that of the busiest device (dropless layers) or expert (layers with a capacity), divided by the mean. Training
logs it as `router/load_max_over_mean`.
"""

import dataclasses
from typing import Any

from rich import box
from rich.table import Table

from moejax.config.dispatch import GroupedDispatch
from moejax.config.experiment import Experiment
from moejax.config.fields import with_fields
from moejax.errors import UserError
from moejax.planning.plan import Plan, plan
from moejax.planning.topology import Topology
from moejax.progress import SILENT, Progress
from moejax.terminal import Fitting

WORST = "worst"


@dataclasses.dataclass(frozen=True)
class Loaded:
  """The plan for one load."""

  load: str
  plan: Plan
  dropped_fraction: float
  """Fraction of the choices of tokens that are dropped."""

  def to_json(self) -> dict[str, Any]:
    """Plain values, under the key `loads` of `moejax plan --json`."""
    return {
      "load": self.load if self.load == WORST else float(self.load),
      "step_time_s": self.plan.step_time_s,
      "step_time_interval_s": list(self.plan.step_time_interval_s),
      "hbm_bytes_per_device": self.plan.hbm_bytes_per_device,
      "fits": self.plan.fits,
      "dropped_fraction": self.dropped_fraction,
    }


def plan_loads(
  experiment: Experiment, topology: Topology, loads: list[str], progress: Progress = SILENT
) -> list[Loaded]:
  """Plans for several loads, each of which is a number of at least 1 or `worst`.

  The receive buffer of a dropless layer has the size of the load, so that time and memory are those of the busiest
  device. A layer with a capacity takes the same time and memory at any load, and drops choices.

  Raises:
    UserError: If a load is not valid, or the experiment has no sparse layers or exchanges no rows.
  """
  for load in loads:
    if load != WORST and not _is_load(load):
      raise UserError(f"--load {load}: a load must be a number of at least 1 (the balanced load), or {WORST}")
  moe = experiment.model.moe
  if moe is None:
    raise UserError(f"--load requires sparse layers, but {experiment.name} has none; remove --load")
  if moe.dispatch.has_capacity:
    planned = plan(experiment, topology, progress)
    return [Loaded(load, planned, dropped_fraction(planned.experiment, load)) for load in loads]
  if not isinstance(moe.dispatch, GroupedDispatch) or moe.dispatch.exchange != "all_to_all":
    raise UserError(
      f"--load has no effect because {experiment.name} does not send rows to the devices of their experts; remove "
      "--load"
    )
  if experiment.mesh.expert == 1:
    raise UserError(
      f"--load has no effect with mesh ({experiment.mesh}), on which each device has all experts; raise mesh.expert"
    )
  return [Loaded(load, plan(_with_buffer(experiment, load), topology, progress), 0.0) for load in loads]


def dropped_fraction(experiment: Experiment, load: str) -> float:
  """Fraction of choices that are dropped at capacity if the busiest expert has this load.

  Assumes that the loads of experts are uniformly distributed, symmetrically around the mean. For loads above 2, where
  this would give negative loads, they are distributed between 0 and the load, and the remaining experts are idle.
  """
  moe = experiment.model.moe
  assert moe
  group_tokens = moe.group_tokens(experiment.data.sequence_length)
  balanced = moe.experts_per_token * group_tokens / moe.num_experts
  capacity = moe.capacity(group_tokens) / balanced
  if load == WORST:  # all tokens choose the same experts
    return max(0.0, 1 - capacity * moe.experts_per_token / moe.num_experts)
  largest = float(load)
  if largest <= capacity:
    return 0.0
  if largest > 2:
    return ((largest - capacity) / largest) ** 2
  if capacity <= 2 - largest:
    return 1 - capacity
  return (largest - capacity) ** 2 / (4 * (largest - 1))


def load_page(loaded: list[Loaded]) -> Fitting:
  """Formats one row per load."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="by router load", title_justify="left")
  for head in ("load", "step, s", "80 % interval, s", "GiB", "fits", "dropped"):
    table.add_column(head, justify="right", no_wrap=True)
  for one in loaded:
    low, high = one.plan.step_time_interval_s
    table.add_row(
      one.load,
      f"{one.plan.step_time_s:.4g}",
      f"{low:.3g} to {high:.3g}",
      f"{one.plan.hbm_bytes_per_device / 2**30:.1f}",
      "yes" if one.plan.fits else "no",
      f"{one.dropped_fraction:.1%}",
    )
  return Fitting(table)


def _is_load(text: str) -> bool:
  try:
    return 1 <= float(text) < float("inf")
  except ValueError:
    return False


def _with_buffer(experiment: Experiment, load: str) -> Experiment:
  return with_fields(experiment, {"model.moe.dispatch.receive_factor": None if load == WORST else float(load)})
