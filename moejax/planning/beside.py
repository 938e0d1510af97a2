"""Compares two plans scope by scope, to show the causes of a difference in step time."""

import dataclasses
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moejax.errors import UserError
from moejax.planning.plan import Plan
from moejax.terminal import Fitting


@dataclasses.dataclass(frozen=True)
class ScopeCost:
  """The cost of one scope of the model, per step and device."""

  time_s: float = 0.0
  """Seconds of operations and exposed collectives. The sum over all scopes is the step time."""
  exposed_s: float = 0.0
  """Seconds of exposed collectives."""
  collective_bytes: float = 0.0
  """Bytes of all collectives, exposed or not."""


def by_scope(plan: Plan) -> dict[str, ScopeCost]:
  """The cost of each scope of the model. `-` stands for operations without a scope."""
  found: dict[str, ScopeCost] = {}
  for operation in plan.operations:
    before = found.get(operation.scope, ScopeCost())
    found[operation.scope] = dataclasses.replace(before, time_s=before.time_s + operation.time_s)
  for name in ("overhead", "host_exposed"):  # without operations
    if seconds := (plan.breakdown_s or {}).get(name):
      found[name] = ScopeCost(time_s=seconds)
  for moved in plan.collectives:
    before = found.get(moved.scope, ScopeCost())
    found[moved.scope] = ScopeCost(
      time_s=before.time_s + moved.exposed_s,
      exposed_s=before.exposed_s + moved.exposed_s,
      collective_bytes=before.collective_bytes + moved.bytes,
    )
  return found


def beside(first: Plan, second: Plan) -> list[dict[str, Any]]:
  """One row per scope, with the largest difference first, as JSON values.

  Raises:
    UserError: If a program does not fit in memory, so that its operations are unknown.
  """
  for plan in (first, second):
    if plan.refused:
      raise UserError(
        f"{plan.experiment.name} does not fit on {plan.topology.name}, so its operations are unknown; see the remedies "
        f"of `moejax plan {plan.experiment.name}`"
      )
  ours, theirs = by_scope(first), by_scope(second)
  rows = []
  for scope in dict.fromkeys([*ours, *theirs]):
    one, other = ours.get(scope, ScopeCost()), theirs.get(scope, ScopeCost())
    rows.append({
      "scope": scope,
      "first": dataclasses.asdict(one),
      "second": dataclasses.asdict(other),
      "difference_s": other.time_s - one.time_s,
    })  # fmt: skip
  return sorted(rows, key=lambda row: -abs(row["difference_s"]))


def beside_page(first: Plan, second: Plan) -> RenderableType:
  """Formats the rows as a table, with both step times."""
  names = (first.experiment.name, second.experiment.name)
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="difference by scope", title_justify="left")
  heads = ("scope", f"{names[0]}, ms", f"{names[1]}, ms", "difference, ms", "exposed, ms", "collectives, MiB")
  for head in heads:
    table.add_column(head, justify="left" if head == "scope" else "right", no_wrap=True)
  for row in beside(first, second):
    one, other = row["first"], row["second"]
    table.add_row(
      row["scope"],
      f"{one['time_s'] * 1e3:,.1f}",
      f"{other['time_s'] * 1e3:,.1f}",
      f"{row['difference_s'] * 1e3:+,.1f}",
      f"{(other['exposed_s'] - one['exposed_s']) * 1e3:+,.1f}",
      f"{(other['collective_bytes'] - one['collective_bytes']) / 2**20:+,.0f}",
    )
  ratio = second.step_time_s / first.step_time_s
  verdict = (
    f"{names[1]} takes {second.step_time_s:.4g} s a step, {ratio:.3f} times the {first.step_time_s:.4g} s of {names[0]}"
  )
  return Group(Fitting(table), Text(verdict, style="bold"))
