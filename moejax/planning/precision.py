"""What fewer bits in matrix products save: the plan of the same program, with its large products at a higher rate.

The products of projections, dense feed-forward layers and shared experts are priced at the rate of 8-bit operands, in
the forward and in both backward products, and what they hide is computed anew. Routed experts, logits, routers and
attention scores stay in bfloat16.
"""

import dataclasses
from typing import Any

from rich import box
from rich.table import Table

from moejax.planning.compile import Compiled
from moejax.planning.kernels import product_speedup
from moejax.planning.plan import Plan, plan_of
from moejax.planning.topology import Topology
from moejax.terminal import Fitting

SCOPES = {
  "qkv": "attention", "attention_out": "attention", "feed_forward": "feed_forward", "shared_experts": "feed_forward",
}  # fmt: skip
"""Where products are priced with 8-bit operands, and the field of model.precision that sets it."""


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
  factors = check_precisions(precisions, topology)
  plain_s = plan_of(compiled, topology).step_time_s
  # What the compiled program computes with 8 bits is priced as such already.
  own = compiled.experiment.model.precision
  scopes = [scope for scope, kind in SCOPES.items() if getattr(own, kind) == "compute"]
  found = []
  for precision, factor in zip(precisions, factors, strict=True):
    planned = plan_of(compiled, topology, dict.fromkeys(scopes, factor))
    found.append(AtPrecision(precision, planned, plain_s / planned.step_time_s))
  return found


def check_precisions(precisions: list[str], topology: Topology) -> list[float]:
  """How much faster the products of each precision are than those of bfloat16.

  Raises:
    UserError: the chip has no such products.
  """
  return [product_speedup(topology.chip, precision) for precision in precisions]


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
