"""Finds the MoE model with the predicted step time of a dense model on a topology."""

import dataclasses
import inspect
import pathlib
import pprint
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moejax.comparison.budget import steps_within
from moejax.comparison.match import Match, approach, compared, distance
from moejax.config.experiment import MATCHABLE_FIELDS, Experiment, Pair
from moejax.config.fields import get_field, with_fields
from moejax.config.parameters import full_sequence_steps, parameter_counts, tokens_per_step
from moejax.config.walk import walk
from moejax.errors import UserError
from moejax.notebook import html_table
from moejax.planning.interval import certainty_of_equality
from moejax.planning.plan import Plan, plan
from moejax.planning.run_cost import run_cost
from moejax.planning.topology import Topology
from moejax.progress import SILENT, Progress
from moejax.terminal import Fitting

WIDTH_STEP = 256
"""Widths are multiples of this number, so that they fill the tiles of the matrix units of all TPUs. Smaller widths vary
in steps of an eighth to a quarter of their value."""

CAPACITIES = (0.5, 0.625, 0.75, 1.0, 1.25, 1.5, 2.0)


@dataclasses.dataclass(frozen=True)
class PodMatch:
  """A dense experiment and the matching MoE."""

  match: Match
  dense: Plan
  """The plan of the dense experiment."""
  moe: Plan
  """The plan of the MoE that was found."""
  experiment: Experiment
  """The matched MoE. Its steps or its budget of tokens take the training time of the dense model."""
  budget_s: float
  """The training time of the dense model in seconds."""
  tolerance: float
  """Maximum relative difference of step times that are considered equal."""

  @property
  def certainty(self) -> float:
    """Probability that the measured step times are within the tolerance (`moejax.planning.interval`)."""
    return certainty_of_equality(self.match.step_time_ratio, self.tolerance)

  def _repr_html_(self) -> str:
    rows: list[tuple[str, object]] = [
      ("step time ratio", self.match.step_time_ratio),
      ("within tolerance", self.match.within_tolerance),
      ("certainty", self.certainty),
    ]
    for of in (self.dense, self.moe):
      rows += [(f"{of.experiment.name}: step time, s", of.step_time_s), (f"{of.experiment.name}: MFU", of.mfu)]
    return html_table(f"{self.match.moe} for {self.match.dense}", [*rows, ("budget, s", self.budget_s)])


def match_on_pod(pair: Pair, topology: Topology, tolerance: float, progress: Progress = SILENT) -> PodMatch:
  """Varies the matchable fields of the candidate, one after the other, until its predicted step time equals that of the
  dense model.

  Raises:
    UserError: If the dense model or every candidate does not fit in memory, no matchable field can be varied, or both
      have the same name.
  """
  if not 0.0 <= tolerance <= 1.0:
    raise UserError(f"tolerance={tolerance} must lie between 0 and 1")
  dense, moe = pair.dense, pair.candidates[0]
  if dense.name == moe.name:
    raise UserError(f"both experiments are named {dense.name!r}; give them different names")
  if not any(_others(moe, field) for field in moe.matchable):
    what = (
      f"matchable={','.join(moe.matchable)} has no other value that is valid" if moe.matchable else "matchable is empty"
    )
    raise UserError(f"{moe.name} has no field to vary: {what}; set matchable to some of {', '.join(MATCHABLE_FIELDS)}")
  of_dense = plan(dense, topology, progress)
  if not of_dense.fits:
    raise UserError(f"{dense.name} does not fit on {topology.name}; see the remedies of `moejax plan {dense.name}`")
  target_s = of_dense.step_time_s
  best = moe, plan(moe, topology, progress)
  for field in moe.matchable:
    if _equal(best[1], target_s, tolerance):
      break
    best = _along(field, best, target_s, topology, tolerance, progress)
  experiment, of_moe = best
  if not of_moe.fits:
    raise UserError(f"no value of {', '.join(moe.matchable)} makes {moe.name} fit on {topology.name}; change its mesh")
  times = {dense.name: target_s, moe.name: of_moe.step_time_s}
  budget_s = full_sequence_steps(dense) * target_s
  experiment = _for_steps(experiment, steps_within(budget_s, moe, dense, times), dense)
  return PodMatch(compared(dense.name, moe.name, times, tolerance), of_dense, of_moe, experiment, budget_s, tolerance)


def _for_steps(experiment: Experiment, steps: int, dense: Experiment) -> Experiment:
  """The experiment with a length of `steps` steps of full sequences. If the length of the dense model is a budget of
  tokens, so is this length, because the number of steps then depends on the padding of the text."""
  training = experiment.training
  if dense.training.steps is not None:
    return dataclasses.replace(experiment, training=dataclasses.replace(training, steps=steps))
  tokens = (steps - 0.5) * tokens_per_step(experiment)  # half a step less, so that rounding up results in `steps`
  counted = parameter_counts(experiment.model.main).counted(training.budget.parameters)
  budget = dataclasses.replace(training.budget, tokens_per_parameter=tokens / counted)
  return dataclasses.replace(experiment, training=dataclasses.replace(training, steps=None, budget=budget))


def experiment_file(experiment: Experiment) -> str:
  """A Python file with the experiment, for `moejax train FILE:matched`."""
  classes = sorted(
    {type(value) for _, value in walk(experiment) if dataclasses.is_dataclass(value)}, key=lambda kind: kind.__name__
  )
  used = [found.__name__ for found in classes if found.__module__.startswith("moejax.")]
  own = [found for found in classes if not found.__module__.startswith("moejax.")]
  text = pprint.pformat(experiment, width=110, sort_dicts=False)
  return (
    f'"""{experiment.name}, matched in step time: written by `moejax match`."""\n\n'
    f"from moejax.config import {', '.join(used)}\n"
    + ("from moejax.lookup import import_file\n\n" if own else "")
    + "".join(f"{found.__name__} = import_file({_file(found)!r}).{found.__name__}\n" for found in own)
    + "\n\ndef matched():\n"
    f'  """{experiment.name} with the step time and the training time of a dense model."""\n  return (\n'
    + "".join(f"    {line}\n" for line in text.splitlines())
    + "  )\n"
  )


def _file(kind: type) -> str:
  """The file of a custom class."""
  return str(pathlib.Path(inspect.getfile(kind)).resolve())


def match_page(found: PodMatch, price_per_chip_hour: float | None = None) -> RenderableType:
  """Formats a table of both models, the result, and what both runs take and cost.

  Raises:
    UserError: If the price is negative.
  """
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  for head in ("", found.dense.experiment.name, found.moe.experiment.name):
    table.add_column(head, justify="right" if head else "left")
  both = (found.dense, found.moe)
  rows: Sequence[tuple[str, Callable[[Plan], str]]] = (
    ("parameters", lambda of: f"{parameter_counts(of.experiment.model).total:,}"),
    ("active", lambda of: f"{parameter_counts(of.experiment.model).active:,}"),
    ("mesh", lambda of: " x ".join(f"{axis} {size}" for axis, size in of.experiment.mesh.shape.items() if size > 1)),
    ("step time, s", lambda of: f"{of.step_time_s:.4g}"),
    ("80 % interval, s", lambda of: "{:.3g} to {:.3g}".format(*of.step_time_interval_s)),
    ("MFU", lambda of: f"{of.mfu:.1%}" if of.mfu else "-"),
    ("GiB a device", lambda of: f"{of.hbm_bytes_per_device / 2**30:.1f}"),
    ("tokens in the budget", lambda of: f"{int(found.budget_s / of.step_time_s) * of.tokens_per_step:,}"),
  )
  for name, value in rows:
    table.add_row(name, *(value(of) for of in both))
  sign = "equal as predicted" if found.match.within_tolerance else "the closest found, not equal"
  verdict = (
    f"{found.match.moe} takes {found.match.step_time_ratio:.3f} times the step time of {found.match.dense}: {sign}"
  )
  certainty = (
    f"probability that the measured step times are within {found.tolerance:.0%} of each other: {found.certainty:.0%}; "
    "measure both before a long run"
  )
  trained = (
    found.dense,
    dataclasses.replace(found.moe, experiment=found.experiment),
  )  # for the time of the dense model
  runs = [Text(f"{of.experiment.name}, {run_cost(of, price_per_chip_hour).summary}") for of in trained]
  return Group(Fitting(table), Text(verdict, style="bold"), Text(certainty), *runs)


def ladder(experiment: Experiment, field: str) -> list[Any]:
  """The values of a field to try, the fastest first.

  Raises:
    UserError: If the field cannot be matched.
  """
  model, moe = experiment.model, experiment.model.moe
  of_experts, of_depths = field.startswith("model.moe."), field.startswith("model.depths.")
  if (of_experts and moe is None) or (of_depths and not model.depths.is_routed):
    raise UserError(f"{experiment.name} has no {field} that can be varied; set matchable to another field")
  now = get_field(experiment, field)
  if field in ("model.moe.d_ff", "model.d_ff"):
    step = WIDTH_STEP if now >= WIDTH_STEP else 2 ** max(0, now.bit_length() - 3)
    return list(range(step, 4 * now + 1, step))
  if field == "model.moe.num_experts":
    assert moe
    return [n for n in (2**k for k in range(1, 11)) if n >= moe.experts_per_token and n % experiment.mesh.expert == 0]
  if field == "model.moe.every":
    return [n for n in range(model.num_layers, 0, -1) if model.num_layers % n == 0 and n <= 8]
  if field == "model.moe.capacity_factor":
    return list(CAPACITIES)
  if field == "model.num_layers":
    return list(range(model.period, 2 * now + 1, model.period))
  if field == "model.depths.share":
    return [sixteenths / 16 for sixteenths in range(1, 17)]
  raise UserError(f"matchable={field!r} cannot be varied; use one of {', '.join(MATCHABLE_FIELDS)}")


def _valid(experiment: Experiment, field: str) -> list[Any]:
  """The values of the ladder for which the experiment is valid."""
  return [value for value in ladder(experiment, field) if _changed(experiment, field, value) is not None]


def _others(experiment: Experiment, field: str) -> list[Any]:
  """Valid values other than the current one."""
  now = get_field(experiment, field)
  return [value for value in _valid(experiment, field) if value != now]


def _along(
  field: str,
  best: tuple[Experiment, Plan],
  target_s: float,
  topology: Topology,
  tolerance: float,
  progress: Progress,
) -> tuple[Experiment, Plan]:
  """The best value of one field, or the current value if no other is closer."""
  experiment, of_best = best
  values = _valid(experiment, field)
  plans: dict[Any, Plan] = {get_field(experiment, field): of_best}

  def clock(value: Any) -> float | None:
    if value not in plans:
      plans[value] = plan(_changed(experiment, field, value) or experiment, topology, progress)
    progress.note(f"{field} = {value}: {_shown(plans[value])}, target {target_s:.4g} s")
    return plans[value].step_time_s if plans[value].fits else None

  now = get_field(experiment, field)
  known = values.index(now) if now in values and of_best.fits else None
  found = approach(target_s, values, clock, tolerance, first=known)
  if found is None:
    return best
  value, seconds = found
  if of_best.fits and distance(of_best.step_time_s, target_s) <= distance(seconds, target_s):
    return best
  return _changed(experiment, field, value) or experiment, plans[value]


def _changed(experiment: Experiment, field: str, value: Any) -> Experiment | None:
  """The experiment with one field changed, or None if it is not valid."""
  try:
    return with_fields(experiment, {field: value})
  except UserError:
    return None


def _equal(of_moe: Plan, target_s: float, tolerance: float) -> bool:
  return of_moe.fits and abs(of_moe.step_time_s / target_s - 1.0) <= tolerance


def _shown(of_moe: Plan) -> str:
  return f"{of_moe.step_time_s:.4g} s" if of_moe.fits else "does not fit"
