"""Formats a plan for the terminal and as an HTML page."""

import html
import io

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moejax.config.parameters import parameter_counts
from moejax.planning.calibrated_chip import calibration_of
from moejax.planning.calibration import Calibrated
from moejax.planning.hints import hints
from moejax.planning.plan import ROUTER_LOAD, SHOWN_OPERATIONS, Plan
from moejax.terminal import Fitting

MIB, GIB = 2**20, 2**30

SHOWN_COLLECTIVES = 12


def plan_page(plan: Plan) -> RenderableType:
  """Formats a plan: whether it fits, time, memory, their breakdown, and hints."""
  return Group(
    Text(f"{plan.experiment.name} on {plan.topology.name}", style="bold"),
    _facts(plan),
    _holders(plan),
    *([_arrays(plan)] if plan.largest_arrays else []),
    *([] if plan.refused else [_breakdown(plan), _operations(plan)]),
    *([_collectives(plan)] if plan.collectives else []),
    *(Text(f"try: {hint}", style="yellow") for hint in hints(plan)),
  )


def calibration_page(calibrated: Calibrated) -> RenderableType:
  """The measured operations and steps of a chip, and the constants that follow."""
  table = _table(f"measured on {calibrated.chip.name}", "operation", "kind", "predicted, ms", "measured, ms", "ratio")
  for one in calibrated.measurements.operations:
    row = (one.name, one.kind, one.predicted_s, one.measured_s)
    table.add_row(*row[:2], *(f"{seconds * 1e3:,.3f}" for seconds in row[2:]), f"{row[2] / row[3]:.3f}")
  found = calibrated.calibration
  constants = (
    f"efficiency of matrix products {found.matrix:.3f}, kernels {found.kernel:.3f}, vector units and memory "
    f"{found.memory:.3f}, links {found.link:.3f}; overhead of a step {found.overhead_s * 1e6:,.1f} us; from "
    f"{_count(found.runs)}"
  )
  use = f"{calibrated.file}: moejax plan NAME --topology ... --calibration {calibrated.file}"
  return Group(Fitting(table), Text(constants), Text(use))


def as_html(title: str, page: RenderableType) -> str:
  """Converts terminal output to a self-contained HTML page."""
  console = Console(record=True, width=130, file=io.StringIO(), force_terminal=True)
  console.print(page, soft_wrap=True)
  title = html.escape(title)
  return console.export_html(inline_styles=True).replace("<head>", f"<head>\n<title>{title}</title>", 1)


def verdict(plan: Plan) -> str:
  """One line that states whether the plan fits in memory, and by how much."""
  used, limit = plan.hbm_bytes_per_device, plan.hbm_limit_bytes
  if plan.fits:
    return f"fits: {used / GIB:.1f} of {limit / GIB:.1f} GiB, {(limit - used) / GIB:.1f} GiB free"
  return f"does not fit: {used / GIB:.1f} of {limit / GIB:.1f} GiB, {(used - limit) / GIB:.1f} GiB too much"


def _facts(plan: Plan) -> Table:
  table = Table(box=None, show_header=False, pad_edge=False)
  table.add_column(justify="right", style="dim")
  table.add_column()
  parameters = parameter_counts(plan.experiment.model)
  mesh = " x ".join(f"{axis} {size}" for axis, size in plan.experiment.mesh.shape.items())
  memory = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.memory_bytes.items() if name != "total")
  rows: list[tuple[str, str | Text]] = [
    ("memory", Text(verdict(plan), style="green" if plan.fits else "bold red")),
    ("GiB", memory),
    ("devices", f"{plan.topology.devices:,} in a mesh of {mesh}"),
    ("parameters", f"{parameters.total:,}, {parameters.active:,} active"),
    ("tokens per step", f"{plan.tokens_per_step:,}, {plan.tokens_per_step // plan.topology.devices:,} per device"),
    ("model FLOPs per step", f"{plan.model_flops_per_step:.4g}"),
  ]
  if not plan.refused:
    remat = " ".join((plan.experiment.model.remat, *plan.experiment.model.save_activations))
    rows.append(("executed FLOPs per device", f"{plan.executed_flops_per_device:.4g} (remat {remat})"))
  if plan.router_load is not None:
    usual = (
      " (as routers have it after training; --load RUN uses that of a run)" if plan.router_load == ROUTER_LOAD else ""
    )
    rows.append(("router load", f"{plan.router_load:.3g} times the mean on the busiest device{usual}"))
  if plan.host and plan.host.bytes:
    moved = f"{plan.host.bytes / GIB:.2f} GiB to and from it in {plan.host.time_s:.3g} s"
    rows.append(("host", f"{moved}, of which {plan.host.exposed_s:.3g} s exposed"))
    if plan.moments_by_formula:
      rows.append(("", "(moments by formula, since XLA describes programs for GPU with moments on the device)"))
  low, high = plan.step_time_interval_s
  rows += [
    ("step time", Text(f"{plan.step_time_s:.4g} s{' by formula' if plan.refused else ''}", style="bold")),
    ("80 % interval", f"{low:.3g} to {high:.3g} s, from {_runs(plan)}"),
    ("tokens per second", f"{plan.tokens_per_s:,.0f}"),
  ]
  if plan.mfu:
    rows.append(("MFU", f"{plan.mfu:.1%}"))
  rows.append(("compiled in", f"{plan.compile_time_s:.0f} s{', cached' if plan.cached else ''}"))
  for name, value in rows:
    table.add_row(name, value)
  return table


def _runs(plan: Plan) -> str:
  """The measurements from which the prediction interval is derived."""
  chip = plan.topology.chip
  calibration = calibration_of(chip)
  if calibration is not None and not plan.refused:
    return f"{_count(calibration.runs)} on {chip.name} in the calibration file"
  if plan.refused or not chip.runs_are_of:
    return "errors of the formula" if plan.refused else f"errors of the formula (no run on {chip.name})"
  return f"runs on {', '.join(chip.runs_are_of)}{'' if chip.name in chip.runs_are_of else f'; none on {chip.name}'}"


def _count(runs: int) -> str:
  """The measurements to which a calibration is fitted."""
  return f"{runs} measured step{'s' if runs > 1 else ''}" if runs else "measured operations"


def _holders(plan: Plan) -> Fitting:
  """What takes the memory, by formula."""
  table = _table("memory by formula", "part", "GiB", "%")
  groups = sorted(plan.memory_by_group.items(), key=lambda item: -item[1])
  total = sum(size for _, size in groups)
  for name, size in groups:
    if size:
      table.add_row(name.replace("_", " "), f"{size / GIB:,.2f}", f"{size / total:.1%}")
  return Fitting(table)


def _arrays(plan: Plan) -> Fitting:
  table = _table("largest arrays of the program", "MiB", "shape", "scope", "pass", "source")
  for array in plan.largest_arrays:
    source = array.source.rpartition("/")[2]
    table.add_row(f"{array.bytes / MIB:,.1f}", array.shape, array.scope, array.of_pass, source)
  return Fitting(table)


def _breakdown(plan: Plan) -> Fitting:
  assert plan.breakdown_s
  table = _table("step time by resource", "part", "ms", "%")
  names = {
    "matrix": "matrix units",
    "vector": "vector units",
    "memory": "memory copies",
    "collective_exposed": "exposed collectives",
    "host_exposed": "exposed copies to and from the host",
    "overhead": "overhead of a step",
  }
  for name, shown in names.items():
    seconds = plan.breakdown_s[name]
    if name in ("host_exposed", "overhead") and not seconds:
      continue
    of_kernels = f" ({plan.kernel_s * 1e3:,.1f} by kernels, roofline)" if name == "matrix" and plan.kernel_s else ""
    table.add_row(shown + of_kernels, f"{seconds * 1e3:,.1f}", f"{seconds / plan.step_time_s:.1%}")
  return Fitting(table)


def _operations(plan: Plan) -> Fitting:
  table = _table("most expensive operations", "scope", "pass", "kind", "ms", "%", "TFLOP", "source")
  for operation in plan.operations[:SHOWN_OPERATIONS]:
    table.add_row(
      operation.scope,
      operation.of_pass,
      operation.kind,
      f"{operation.time_s * 1e3:,.1f}",
      f"{operation.fraction:.1%}",
      f"{operation.flops / 1e12:,.1f}",
      operation.source.rpartition("/")[2],
    )
  return Fitting(table)


def _collectives(plan: Plan) -> Fitting:
  table = _table("collectives", "axis", "kind", "scope", "MiB", "GB/s", "ms", "exposed")
  for moved in plan.collectives[:SHOWN_COLLECTIVES]:
    table.add_row(
      moved.axis,
      moved.kind,
      moved.scope,
      f"{moved.bytes / MIB:,.0f}",
      f"{moved.bandwidth_bytes_per_s / 1e9:,.0f}",
      f"{moved.time_s * 1e3:,.1f}",
      f"{moved.exposed_s * 1e3:,.1f}",
    )
  return Fitting(table)


def _table(title: str, *heads: str) -> Table:
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
  words = ("part", "scope", "pass", "kind", "axis", "operation", "source", "shape")
  for head in heads:
    table.add_column(head, justify="left" if head in words else "right", no_wrap=True)
  return table
