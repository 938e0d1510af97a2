"""Searches mesh, remat, gradient accumulation and dispatch for the fastest plan of an experiment on a topology.

Compiled programs are cached (`compile.py`), so a search that was stopped resumes.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, get_args

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moejax.config.dispatch import Dispatch, EinsumDispatch, GroupedDispatch
from moejax.config.experiment import Experiment
from moejax.config.model import Remat
from moejax.config.sharding import Mesh
from moejax.errors import UserError
from moejax.planning.compile import RefusedError
from moejax.planning.estimate import SMALLEST_SHARD, estimate
from moejax.planning.plan import Plan, plan
from moejax.planning.topology import Topology
from moejax.progress import SILENT, Progress

LARGEST_MODEL_AXIS = 16

ROOM = 1.15
"""Candidates are compiled if the formula's memory is at most this multiple of the limit, since it is approximate."""

ACCUMULATIONS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Found:
  """One variant that a search compiled."""

  options: str
  """The command-line options of the variant. Empty for the experiment itself."""
  plan: Plan

  def to_json(self) -> dict[str, Any]:
    """The plan's values and `options`."""
    return self.plan.to_json() | {"options": self.options}


def search(experiment: Experiment, topology: Topology, tries: int, progress: Progress = SILENT) -> list[Found]:
  """Plans of the candidates that a formula ranks first. Those that fit come first, sorted by step time.

  A candidate that the compiler rejects is skipped with a note.

  Raises:
    UserError: fewer than one try, no candidate is valid, or the compiler rejects all of them.
  """
  if tries < 1:
    raise UserError(f"{tries} tries: a search needs one or more")
  ranked = sorted(candidates(experiment, topology), key=lambda found: estimate(found, topology.chip).step_time_s)
  if not ranked:
    raise UserError(f"no mesh of {topology.name} suits {experiment.name}; change its batch or its widths")
  fitting = [
    found for found in ranked if estimate(found, topology.chip).memory_bytes <= ROOM * topology.chip.hbm_bytes
  ] or ranked
  tried: list[Found] = []
  refusal = None
  for number, candidate in enumerate(fitting[:tries], 1):
    progress.whole(number - 1, None)
    options = " ".join(difference(experiment, candidate))
    progress.note(f"{number} of {min(tries, len(fitting))}, of {len(ranked)} valid: {options or 'unchanged'}")
    try:
      found = Found(options, plan(candidate, topology, progress))
    except RefusedError as error:
      progress.note(f"  {error}")
      refusal = error
      continue
    progress.note(f"  {found.plan.step_time_s:.4g} s" if found.plan.fits else "  does not fit")
    tried.append(found)
  if refusal and not tried:
    raise refusal
  return sorted(tried, key=lambda found: (not found.plan.fits, found.plan.step_time_s or 0.0))


def frontier(tried: list[Found]) -> list[Found]:
  """The variants that fit and that no other variant beats in both step time and memory (Pareto frontier)."""
  fit = [(found.plan.step_time_s or 0.0, found.plan.hbm_bytes_per_device, found) for found in tried if found.plan.fits]
  return [
    found
    for seconds, size, found in fit
    if not any((s <= seconds and b < size) or (s < seconds and b <= size) for s, b, _ in fit)
  ]


def search_page(tried: list[Found]) -> RenderableType:
  """A table of all variants that marks the Pareto frontier of step time and memory."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  for head in ("", "step, s", "MFU", "exposed", "GiB", "options"):
    table.add_column(head, justify="left" if head in ("", "options") else "right")
  best = frontier(tried)
  for found in tried:
    planned = found.plan
    size = f"{planned.hbm_bytes_per_device / 2**30:.1f}"
    if not planned.fits or not planned.step_time_s or not planned.breakdown_s:
      table.add_row("", "does not fit", "", "", size, found.options)
      continue
    table.add_row(
      "*" if found in best else "",
      f"{planned.step_time_s:.4g}",
      f"{planned.mfu:.1%}" if planned.mfu else "-",
      f"{planned.breakdown_s['collective_exposed'] / planned.step_time_s:.0%}",
      size,
      found.options or "unchanged",
    )
  return Group(table, Text("* no other is both faster and smaller", style="dim"))


def candidates(experiment: Experiment, topology: Topology) -> Iterator[Experiment]:
  """Every valid variant: mesh, axes that shard dense weights, remat, parts of the batch, dispatch."""
  moe = experiment.model.moe
  dispatches = _dispatches(moe.dispatch) if moe else [None]
  # A model without experts has no product with a batch dimension, so that dots keeps what products keeps.
  twin = "products" if experiment.model.remat == "dots" else "dots"
  same = {"none"} if moe or experiment.model.attention_experts else {"none", twin}
  remats = [remat for remat in get_args(Remat) if remat not in same]
  for mesh, dispatch in itertools.product(_meshes(topology, moe.num_experts if moe else 1), dispatches):
    for embed, remat, parts in itertools.product(_embed(mesh), remats, ACCUMULATIONS):
      changed = _variant(experiment, mesh, embed, remat, parts, dispatch)
      if changed is not None:
        yield changed


def difference(experiment: Experiment, candidate: Experiment) -> list[str]:
  """The options that make a candidate of an experiment."""
  options = [f"--mesh.{axis} {size}" for axis, size in candidate.mesh.shape.items()
             if getattr(experiment.mesh, axis) != size]  # fmt: skip
  if dict(experiment.rules)["embed"] != dict(candidate.rules)["embed"]:
    options.append(f"--rules.embed {' '.join(dict(candidate.rules)['embed'])}")
  if experiment.model.remat != candidate.model.remat:
    options.append(f"--model.remat {candidate.model.remat}")
  if experiment.training.gradient_accumulation != candidate.training.gradient_accumulation:
    options.append(f"--training.gradient-accumulation {candidate.training.gradient_accumulation}")
  old, new = experiment.model.moe, candidate.model.moe
  if old and new and old.dispatch != new.dispatch:
    options.append(f"--model.moe.dispatch {new.dispatch.kind}")
  if old and new and old.capacity_factor != new.capacity_factor:
    options.append(f"--model.moe.capacity-factor {new.capacity_factor:g}")
  return options


def _dispatches(own: Dispatch) -> list[Dispatch | None]:
  """The dispatches to try. A dense one computes something else, and what a user's own computes is not known."""
  alternatives = (EinsumDispatch(), GroupedDispatch())
  if own.kind not in [other.kind for other in alternatives]:
    return [own]
  return [own if own.kind == other.kind else other for other in alternatives]


def _meshes(topology: Topology, num_experts: int) -> Iterator[Mesh]:
  def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]

  for model in divisors(topology.devices):
    if model > LARGEST_MODEL_AXIS:
      continue
    for expert in divisors(topology.devices // model):
      if num_experts % expert:
        continue
      rest = topology.devices // (model * expert)
      for replica in divisors(rest):
        if replica % topology.slices == 0:
          yield Mesh(replica=replica, data=rest // replica, expert=expert, model=model)


def _embed(mesh: Mesh) -> list[tuple[str, ...]]:
  """The axes that may shard dense weights, of data and expert, so that no shard is smaller than a tile."""
  assert mesh.data
  sizes = {("data", "expert"): mesh.data * mesh.expert, ("data",): mesh.data, ("expert",): mesh.expert}
  thick = {axes: size for axes, size in sizes.items() if size <= SMALLEST_SHARD}
  most = max(thick.values(), default=0)
  return [axes for axes, size in thick.items() if size == most][:1] or [("data", "expert")]


def _variant(
  experiment: Experiment, mesh: Mesh, embed: tuple[str, ...], remat: Remat, parts: int, dispatch: Dispatch | None
) -> Experiment | None:
  model = dataclasses.replace(experiment.model, remat=remat)
  try:
    if dispatch is not None and model.moe and dispatch != model.moe.dispatch:
      has_capacity = dispatch.has_capacity or model.moe.router.has_capacity
      factor = model.moe.capacity_factor if has_capacity else 1.0
      model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, dispatch=dispatch, capacity_factor=factor))
    training = dataclasses.replace(experiment.training, gradient_accumulation=parts)
    rules = tuple((name, embed if name == "embed" else axes) for name, axes in dict(experiment.rules).items())
    return dataclasses.replace(experiment, model=model, training=training, mesh=mesh, rules=rules)
  except UserError:
    return None
