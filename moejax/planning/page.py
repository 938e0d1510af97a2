"""A plan as text for the terminal, and as an HTML page."""

import html
import io

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moejax.config.parameters import parameter_counts
from moejax.planning.hints import hints
from moejax.planning.plan import Plan

MIB, GIB = 2**20, 2**30

SHOWN_COLLECTIVES = 12


def plan_page(plan: Plan) -> RenderableType:
  """The verdict, time and memory, where the time goes, and hints."""
  return Group(
    Text(f"{plan.experiment.name} on {plan.topology.name}", style="bold"),
    _facts(plan),
    *([_breakdown(plan), _operations(plan), _collectives(plan)] if plan.step_time_s else []),
    *(Text(f"try: {hint}", style="yellow") for hint in hints(plan)),
  )


def plan_html(plan: Plan) -> str:
  """The same page as a self-contained HTML file."""
  console = Console(record=True, width=130, file=io.StringIO(), force_terminal=True)
  console.print(plan_page(plan), soft_wrap=True)
  title = html.escape(f"{plan.experiment.name} on {plan.topology.name}")
  return console.export_html(inline_styles=True).replace("<head>", f"<head>\n<title>{title}</title>", 1)


def verdict(plan: Plan) -> str:
  """Whether it fits, and by how much, in one line."""
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
    ("tokens per step", f"{plan.tokens_per_step:,}, {plan.tokens_per_step // plan.topology.devices:,} a device"),
    ("model FLOPs per step", f"{plan.model_flops_per_step:.4g}"),
  ]
  if plan.step_time_s and plan.tokens_per_s:
    rows += [
      ("executed FLOPs per device", f"{plan.executed_flops_per_device:.4g} (remat {plan.experiment.model.remat})"),
      ("step time", Text(f"{plan.step_time_s:.4g} s", style="bold")),
      ("tokens per second", f"{plan.tokens_per_s:,.0f}"),
    ]
  if plan.mfu:
    rows.append(("MFU", f"{plan.mfu:.1%}"))
  rows.append(("compiled in", f"{plan.compile_time_s:.0f} s{', cached' if plan.cached else ''}"))
  for name, value in rows:
    table.add_row(name, value)
  return table


def _breakdown(plan: Plan) -> Table:
  assert plan.breakdown_s and plan.step_time_s
  table = _table("where the time goes", "part", "ms", "%")
  names = {
    "matrix": "matrix units",
    "vector": "vector units",
    "memory": "memory copies",
    "collective_exposed": "exposed collectives",
  }
  for name, shown in names.items():
    seconds = plan.breakdown_s[name]
    of_kernels = f" ({plan.kernel_s * 1e3:,.1f} by kernels, roofline)" if name == "matrix" and plan.kernel_s else ""
    table.add_row(shown + of_kernels, f"{seconds * 1e3:,.1f}", f"{seconds / plan.step_time_s:.1%}")
  return table


def _operations(plan: Plan) -> Table:
  table = _table("most expensive operations", "scope", "pass", "kind", "ms", "%", "TFLOP", "times")
  for operation in plan.operations:
    table.add_row(
      operation.scope,
      operation.of_pass,
      operation.kind,
      f"{operation.time_s * 1e3:,.1f}",
      f"{operation.fraction:.1%}",
      f"{operation.flops / 1e12:,.1f}",
      f"{operation.count}",
    )
  return table


def _collectives(plan: Plan) -> Table:
  table = _table("collectives", "axis", "kind", "scope", "devices", "MiB", "GB/s", "ms", "exposed ms", "overlapped")
  for moved in plan.collectives[:SHOWN_COLLECTIVES]:
    table.add_row(
      moved.axis,
      moved.kind,
      moved.scope,
      f"{moved.devices}",
      f"{moved.bytes / MIB:,.0f}",
      f"{moved.bandwidth_bytes_per_s / 1e9:,.0f}",
      f"{moved.time_s * 1e3:,.1f}",
      f"{moved.exposed_s * 1e3:,.1f}",
      "yes" if moved.overlapped else "no",
    )
  return table


def _table(title: str, *heads: str) -> Table:
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
  words = ("part", "scope", "pass", "kind", "axis", "overlapped")
  for head in heads:
    # On a narrow terminal words fold, so that no number is cut.
    folds = head in words and head != "overlapped"
    table.add_column(head, justify="left" if head in words else "right", no_wrap=not folds, overflow="fold")
  return table
