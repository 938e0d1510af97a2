"""What fewer bits in matrix products save: the plan of the same program, with its large products at a higher rate.

The products of projections, feed-forward layers and experts are priced at the rate of 8-bit operands, in the forward
and in both backward products, and what they hide is computed anew. Logits, routers and attention scores stay in
bfloat16.

Grouped products of dropless layers are priced as the kernels for 8-bit operands are (`moejax.planning.kernels`): on
TPU with the passes that round the operands of the gradient of matrices, and on GPU with both backward products of fp8
in bfloat16.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from moejax.config.experiment import Experiment
from moejax.config.fields import with_fields
from moejax.planning.compile import Compiled
from moejax.planning.kernels import product_speedup
from moejax.planning.plan import Plan, plan_of
from moejax.planning.topology import Topology
from moejax.terminal import Fitting

LARGE = ("attention", "feed_forward", "experts")
"""The fields of model.precision whose products are planned with fewer bits."""


@dataclasses.dataclass(frozen=True)
class AtPrecision:
  """The plan with products in one precision."""

  precision: str
  plan: Plan
  speedup: float
  """Step time in bfloat16 over that of this plan."""

  def to_json(self) -> dict[str, Any]:
    """Plain values, under the key `precisions` of `moejax plan --json`."""
    return {
      "precision": self.precision,
      "step_time_s": self.plan.step_time_s,
      "step_time_interval_s": list(self.plan.step_time_interval_s),
      "breakdown_s": self.plan.breakdown_s,
      "speedup": self.speedup,
    }


def plan_precisions(compiled: Compiled, topology: Topology, precisions: list[str]) -> list[AtPrecision]:
  """The plans of a compiled step with products in several precisions, each bfloat16 or one that the chip has.

  Raises:
    UserError: the chip has no such products.
  """
  check_precisions(precisions, topology)
  plain_s = plan_of(compiled, topology).step_time_s
  found = []
  for precision in precisions:
    planned = plan_of(compiled, topology, at_precision(compiled.experiment, precision).model.precision)
    found.append(AtPrecision(precision, planned, plain_s / planned.step_time_s))
  return found


def at_precision(experiment: Experiment, precision: str) -> Experiment:
  """The experiment with its large products in this type, except those that it has in 8 bits already."""
  if precision == "bfloat16":
    return experiment
  model = experiment.model
  changed = [kind for kind in LARGE if kind in model.products and getattr(model.precision, kind) == "compute"]
  return with_fields(experiment, {f"model.precision.{kind}": precision for kind in changed})


def check_precisions(precisions: Sequence[str], topology: Topology) -> None:
  """Checks that the chip has products of these types.

  Raises:
    UserError: the chip has no such products.
  """
  for precision in precisions:
    product_speedup(topology.chip, precision)


def precision_page(found: list[AtPrecision]) -> Fitting:
  """One row for each precision."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="by precision of the large products", title_justify="left")
  for head in ("precision", "step, s", "80 % interval, s", "matrix, s", "exposed, s", "speedup"):
    table.add_column(head, justify="right", no_wrap=True)
  for one in found:
    low, high = one.plan.step_time_interval_s
    breakdown_s = one.plan.breakdown_s
    parts = (f"{breakdown_s[name]:.4g}" if breakdown_s else "-" for name in ("matrix", "collective_exposed"))
    row = (one.precision, f"{one.plan.step_time_s:.4g}", f"{low:.3g} to {high:.3g}", *parts)
    table.add_row(*row, f"{one.speedup:.2f}")
  return Fitting(table)
