"""Searches for the fastest configuration of an experiment on a topology: mesh, remat and gradient accumulation.

The model does not change. Compiled programs are cached (`compile.py`), so that a search can resume.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moejax.config.experiment import Experiment
from moejax.config.remat import Remat, Saved
from moejax.config.sharding import Mesh
from moejax.errors import UserError
from moejax.planning.compile import RefusedError
from moejax.planning.estimate import Estimate, estimate
from moejax.planning.meshes import mesh_options, meshes
from moejax.planning.plan import Plan, plan
from moejax.planning.topology import Topology
from moejax.progress import SILENT, Progress
from moejax.terminal import Fitting

LARGEST_MODEL_AXIS = 16

MOST_SHARDS = 64
"""Dense weights are sharded over at most so many devices if a mesh axis allows it: sums of gradients over all chips of
a slice move twice the bytes of those over fewer chips (`moejax.planning.estimate`)."""

ROOM = 1.35
"""Configurations are tried if their memory according to the formula is at most this multiple of the limit."""

MARGIN = 1.1
"""The same multiple, after the formula has been corrected by compiled programs. As long as none of them fits,
configurations within the inverse come first, so that a search does not spend all tries on those that miss the limit by
a little."""

ACCUMULATIONS = (1, 2, 4, 8, 16, 32)

SELECTIONS: tuple[tuple[Saved, ...], ...] = (("context",), ("queries", "keys_values", "context"))
"""Values of `Model.save_activations` between "layer_inputs" and "attention"."""


Estimated = tuple[Experiment, Estimate]
"""A configuration and its estimate by formula."""


@dataclasses.dataclass(frozen=True)
class Found:
  """A configuration that a search has compiled."""

  options: str
  """The command-line options of the configuration. Empty for the experiment itself."""
  plan: Plan

  def to_json(self) -> dict[str, Any]:
    """The values of the plan, and `options`."""
    return self.plan.to_json() | {"options": self.options}


def search(experiment: Experiment, topology: Topology, tries: int, progress: Progress = SILENT) -> list[Found]:
  """Plans the configurations that a formula ranks first. Those that fit come first, sorted by step time.

  Configurations that differ only in gradient accumulation count as one: the smallest accumulation that fits according
  to the formula is compiled and, if it does not fit, the next. The memory according to the formula is corrected by
  compiled programs. Configurations that the compiler rejects for other reasons are skipped with a note.

  Raises:
    UserError: If `tries` is less than 1, no configuration is valid, or the compiler rejects all of them.
  """
  if tries < 1:
    raise UserError(f"--tries={tries} must be at least 1")
  waiting = _by_layout(candidates(experiment, topology), topology)
  if not waiting:
    raise UserError(f"no mesh of {topology.name} is valid for {experiment.name}; change its batch size or its widths")
  tried: list[Found] = []
  refusal = None
  ratios: list[float] = []
  for number in range(1, tries + 1):
    margins = (MARGIN,) if any(found.plan.fits for found in tried) else (1 / MARGIN, MARGIN)
    rooms = [margin / statistics.median(ratios) for margin in margins] if ratios else [ROOM]
    taken = _next(waiting, [room * topology.chip.hbm_bytes for room in rooms])
    if taken is None:
      break
    layout, (candidate, estimated) = taken
    progress.whole(number - 1, None)
    options = " ".join(difference(experiment, candidate))
    progress.note(f"{number} of {tries}: {options or 'unchanged'}")
    try:
      found = Found(options, plan(candidate, topology, progress))
    except RefusedError as error:
      progress.note(f"  {error}")
      refusal = error
      continue
    # Of the same layout, what is slower is of no use after a fit, and otherwise what needs as much memory.
    better = "step_time_s" if found.plan.fits else "memory_bytes"
    layout[:] = [one for one in layout if getattr(one[1], better) < getattr(estimated, better)]
    ratios.append(found.plan.hbm_bytes_per_device / estimated.memory_bytes)
    progress.note(f"  {found.plan.step_time_s:.4g} s" if found.plan.fits else "  does not fit")
    tried.append(found)
  if refusal and not tried:
    raise refusal
  return sorted(tried, key=lambda found: (not found.plan.fits, found.plan.step_time_s))


def _by_layout(found: Iterable[Experiment], topology: Topology) -> list[list[Estimated]]:
  """Groups configurations that differ only in gradient accumulation. The fastest according to the formula is first."""
  groups: dict[tuple, list[Estimated]] = {}
  for candidate in found:
    layout = (candidate.mesh, candidate.rules, candidate.model.saved_values, candidate.model.remat)
    groups.setdefault(layout, []).append((candidate, estimate(candidate, topology)))
  return [sorted(group, key=lambda one: one[1].step_time_s) for group in groups.values()]


def _next(waiting: list[list[Estimated]], limits: Iterable[float]) -> tuple[list[Estimated], Estimated] | None:
  """Takes the next configuration to compile from its group: the fastest according to the formula that needs at most the
  first limit, or the next one. If none does, the one that needs the least memory.

  Returns the remaining configurations of its group, and the configuration."""
  ways = [(group, one) for group in waiting for one in group]
  if not ways:
    return None
  fitting = ([way for way in ways if way[1][1].memory_bytes <= limit] for limit in limits)
  ranked = next(filter(None, fitting), [])
  if ranked:
    group, chosen = min(ranked, key=lambda way: way[1][1].step_time_s)
  else:
    group, chosen = min(ways, key=lambda way: way[1][1].memory_bytes)
  group.remove(chosen)
  return group, chosen


def frontier(tried: list[Found]) -> list[Found]:
  """The configurations that fit and for which no other is better in both step time and memory."""
  fit = [(found.plan.step_time_s, found.plan.hbm_bytes_per_device, found) for found in tried if found.plan.fits]
  return [
    found
    for seconds, size, found in fit
    if not any((s <= seconds and b < size) or (s < seconds and b <= size) for s, b, _ in fit)
  ]


def search_page(tried: list[Found]) -> RenderableType:
  """Formats a table of all configurations and marks the Pareto frontier of step time and memory."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  for head in ("", "step, s", "MFU", "exposed", "GiB", "options"):
    table.add_column(head, justify="left" if head in ("", "options") else "right")
  best = frontier(tried)
  for found in tried:
    planned = found.plan
    size = f"{planned.hbm_bytes_per_device / 2**30:.1f}"
    if not planned.fits or not planned.breakdown_s:
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
  return Group(Fitting(table), Text("* no other configuration is both faster and smaller", style="dim"))


def candidates(experiment: Experiment, topology: Topology) -> Iterator[Experiment]:
  """Yields all valid configurations of the model: mesh, axes that shard dense weights, remat, gradient accumulation."""
  moe = experiment.model.moe
  # Without experts, no product has a batch dimension, so that dots is the same as products.
  twin = "products" if experiment.model.remat == "dots" else "dots"
  same = {"none"} if moe or experiment.model.attention_experts else {"none", twin}
  remats: list[tuple[Remat, tuple[Saved, ...]]] = [
    (remat, ()) for remat in get_args(Remat) if remat not in same and remat != "selected"
  ]
  remats += [("selected", saved) for saved in dict.fromkeys((*SELECTIONS, experiment.model.save_activations)) if saved]
  for mesh in meshes(topology, moe.num_experts if moe else 1, LARGEST_MODEL_AXIS, experiment.mesh.context):
    for embed, (remat, saved), parts in itertools.product(_embed(mesh), remats, ACCUMULATIONS):
      changed = _variant(experiment, mesh, embed, parts, remat, saved)
      if changed is not None:
        yield changed


def difference(experiment: Experiment, candidate: Experiment) -> list[str]:
  """The command-line options that change an experiment to a configuration."""
  options = mesh_options(experiment.mesh, candidate.mesh)
  if dict(experiment.rules)["embed"] != dict(candidate.rules)["embed"]:
    options.append(f"--rules.embed {' '.join(dict(candidate.rules)['embed'])}")
  before, after = experiment.model, candidate.model
  if before.remat != after.remat:
    options.append(f"--model.remat {after.remat}")
  for name in ("save_activations", "offload_activations"):
    if getattr(before, name) != getattr(after, name):
      options.append(" ".join((f"--model.{name.replace('_', '-')}", *getattr(after, name))))
  if experiment.training.gradient_accumulation != candidate.training.gradient_accumulation:
    options.append(f"--training.gradient-accumulation {candidate.training.gradient_accumulation}")
  return options


def _embed(mesh: Mesh) -> list[tuple[str, ...]]:
  """Combination of data and expert that shards dense weights over the most devices, up to MOST_SHARDS."""
  assert mesh.data
  sizes = {("data", "expert"): mesh.data * mesh.expert, ("data",): mesh.data, ("expert",): mesh.expert}
  thick = {axes: size for axes, size in sizes.items() if size <= MOST_SHARDS}
  most = max(thick.values(), default=0)
  return [axes for axes, size in thick.items() if size == most][:1] or [("data", "expert")]


def _variant(
  experiment: Experiment, mesh: Mesh, embed: tuple[str, ...], parts: int, remat: Remat, saved: tuple[Saved, ...]
) -> Experiment | None:
  try:
    model = experiment.model.with_remat(remat, saved)
    training = dataclasses.replace(experiment.training, gradient_accumulation=parts)
    rules = tuple((name, embed if name == "embed" else axes) for name, axes in dict(experiment.rules).items())
    return dataclasses.replace(experiment, model=model, training=training, mesh=mesh, rules=rules)
  except UserError:
    return None
