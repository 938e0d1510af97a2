"""Plans with an unbalanced router: time and memory of the busiest device, or the fraction of dropped choices.

A load is that of the busiest device (dropless layers) or expert (layers with a capacity), divided by the mean. Training
logs that of the busiest expert as `router/load_max_over_mean`, and the load of each expert as `router/load`.
"""

import dataclasses
import pathlib
import statistics
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moejax.config.experiment import Experiment
from moejax.config.fields import with_fields
from moejax.errors import UserError
from moejax.planning.activations import exchanges_rows
from moejax.planning.measured_run import MeasuredRun, read_measured_run
from moejax.planning.plan import Plan, plan
from moejax.planning.topology import Topology
from moejax.progress import SILENT, Progress
from moejax.terminal import Fitting

WORST = "worst"


@dataclasses.dataclass(frozen=True)
class Load:
  """A load to plan."""

  name: str
  """As it was given: a number, `worst`, or the directory of a run."""
  value: float
  """Infinite for the worst load."""
  run: MeasuredRun | None = None
  """The run in which it was measured."""


@dataclasses.dataclass(frozen=True)
class Loaded:
  """The plan for one load."""

  load: Load
  plan: Plan
  dropped_fraction: float
  """Fraction of the choices of tokens that are dropped."""

  def to_json(self) -> dict[str, Any]:
    """Plain values, under the key `loads` of `moejax plan --json`."""
    return {
      "load": WORST if self.load.name == WORST else self.load.value,
      "measured_in": None if self.load.run is None else self.load.name,
      "step_time_s": self.plan.step_time_s,
      "step_time_interval_s": list(self.plan.step_time_interval_s),
      "hbm_bytes_per_device": self.plan.hbm_bytes_per_device,
      "fits": self.plan.fits,
      "dropped_fraction": self.dropped_fraction,
    }


def plan_loads(
  experiment: Experiment, topology: Topology, loads: list[str], progress: Progress = SILENT
) -> list[Loaded]:
  """Plans for several loads, each of which is a number of at least 1, `worst`, or the directory of a finished run,
  whose measured load counts.

  The receive buffer of a dropless layer has the size of the load, so that time and memory are those of the busiest
  device. A layer with a capacity takes the same time and memory at any load, and drops choices.

  Raises:
    UserError: If a load is not valid, or the experiment has no sparse layers or exchanges no rows.
  """
  for load in loads:
    if load != WORST and not _is_load(load) and not _is_directory(load):
      raise UserError(
        f"--load {load}: a load must be a number of at least 1 (the balanced load), {WORST}, or the directory of a run"
      )
  moe = experiment.model.moe
  if moe is None:
    raise UserError(f"--load requires sparse layers, but {experiment.name} has none; remove --load")
  if moe.dispatch.has_capacity:
    known = [_load(name, experiment, moe.num_experts) for name in loads]
    planned = plan(experiment, topology, progress)
    return [Loaded(load, planned, dropped_fraction(planned.experiment, load)) for load in known]
  if experiment.mesh.expert == 1:
    raise UserError(
      f"--load has no effect with mesh ({experiment.mesh}), on which each device has all experts; raise mesh.expert"
    )
  if not exchanges_rows(experiment):
    raise UserError(
      f"--load has no effect because {experiment.name} does not send rows to the devices of their experts; remove "
      "--load"
    )
  known = [_load(name, experiment, experiment.mesh.expert) for name in loads]
  return [
    Loaded(load, plan(_with_buffer(experiment, load), topology, progress, load=load.value), 0.0) for load in known
  ]


def _load(name: str, experiment: Experiment, groups: int) -> Load:
  """The load with this name; of a run, that of the busiest of `groups` equal groups of experts."""
  if name == WORST or not _is_directory(name):
    return Load(name, float("inf") if name == WORST else float(name))
  run, moe = read_measured_run(pathlib.Path(name), "--load"), experiment.model.moe
  assert moe
  if not run.loads:
    raise UserError(f"--load {name}: the run has no router loads; give a run with sparse layers")
  there = len(run.loads[0][0])
  if there != moe.num_experts:
    raise UserError(
      f"--load {name}: the run has {there} experts, but {experiment.name} has {moe.num_experts}; give a run with as "
      "many experts, or a number"
    )
  return Load(name, run.load(groups), run)


def dropped_fraction(experiment: Experiment, load: Load) -> float:
  """Fraction of choices that are dropped at capacity if the experts have the loads of a measured run, or if the busiest
  expert has this load.

  In the second case, the loads of experts are assumed to be uniformly distributed, symmetrically around the mean. For
  loads above 2, where this would give negative loads, they are distributed between 0 and the load, and the remaining
  experts are idle.
  """
  moe = experiment.model.moe
  assert moe
  group_tokens = moe.group_tokens(experiment.data.sequence_length)
  balanced = moe.experts_per_token * group_tokens / moe.num_experts
  capacity = moe.capacity(group_tokens) / balanced
  if load.run is not None:
    shares = [share / sum(layer) for record in load.run.loads for layer in record for share in layer]
    return moe.num_experts * statistics.fmean(max(0.0, share - capacity / moe.num_experts) for share in shares)
  if load.name == WORST:  # all tokens choose the same experts
    return max(0.0, 1 - capacity * moe.experts_per_token / moe.num_experts)
  largest = load.value
  if largest <= capacity:
    return 0.0
  if largest > 2:
    return ((largest - capacity) / largest) ** 2
  if capacity <= 2 - largest:
    return 1 - capacity
  return (largest - capacity) ** 2 / (4 * (largest - 1))


def load_page(loaded: list[Loaded]) -> RenderableType:
  """Formats one row per load."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="by router load", title_justify="left")
  for head in ("load", "step, s", "80 % interval, s", "GiB", "fits", "dropped"):
    table.add_column(head, justify="right", no_wrap=True)
  for one in loaded:
    low, high = one.plan.step_time_interval_s
    table.add_row(
      one.load.name if one.load.run is None else f"{one.load.value:.3g}",
      f"{one.plan.step_time_s:.4g}",
      f"{low:.3g} to {high:.3g}",
      f"{one.plan.hbm_bytes_per_device / 2**30:.1f}",
      "yes" if one.plan.fits else "no",
      f"{one.dropped_fraction:.1%}",
    )
  measured = [f"load {one.load.value:.3g} was measured in {one.load.name}" for one in loaded if one.load.run]
  return Group(Fitting(table), *map(Text, measured))


def _is_load(text: str) -> bool:
  try:
    return 1 <= float(text) < float("inf")
  except ValueError:
    return False


def _is_directory(text: str) -> bool:
  return bool(text.strip()) and "\0" not in text and pathlib.Path(text).is_dir()


def _with_buffer(experiment: Experiment, load: Load) -> Experiment:
  factor = None if load.name == WORST else max(1.0, load.value)
  return with_fields(experiment, {"model.moe.dispatch.receive_factor": factor})
