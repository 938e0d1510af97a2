"""Sparse layers: how many experts, how wide, who competes for their capacity."""

import dataclasses
import math
from typing import Literal, get_args

from moejax.config import checks
from moejax.errors import UserError

Priority = Literal["choice", "token"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
  """The sparse feed-forward layers of a model."""

  num_experts: int
  """Experts in a sparse layer (E)."""
  experts_per_token: int
  """Experts that each token is sent to (A, top-k)."""
  d_ff: int
  """SwiGLU hidden width of one expert."""
  every: int = 1
  """Every n-th layer is sparse, beginning with layer n: 1 makes all layers sparse, 2 the second, fourth, ..."""
  capacity_factor: float = 1.0
  """Rows that an expert takes per group, as a multiple of the balanced load A x M / E. GShard and arXiv 2405.15052
  multiply M / E instead: their 2.0 with top-2 is 1.0 here."""
  group_size: int = 256
  """Tokens that compete for one capacity (M). A property of the experiment and never of the mesh, so that the same
  tokens are dropped on every mesh. Dispatch masks hold capacity_factor x A x M^2 elements a group."""
  priority: Priority = "choice"
  """Who takes the rows of an expert that is full: choice gives them to all first choices before any second choice
  (GShard), so that a later token may push out an earlier one, which then depends on what it is to predict; token gives
  them to earlier tokens first, and no prediction depends on a later token."""
  renormalize: bool = True
  """Whether the weights of a token's chosen experts are scaled to sum to 1 (GShard) or stay probabilities (Switch)."""

  def __post_init__(self):
    checks.one_of(self, "priority", get_args(Priority))
    checks.positive(self, "num_experts", "experts_per_token", "d_ff", "every", "capacity_factor", "group_size")
    if self.experts_per_token > self.num_experts:
      raise UserError(
        f"moe.experts_per_token={self.experts_per_token} is more than moe.num_experts={self.num_experts}; "
        f"use at most {self.num_experts}"
      )

  @property
  def capacity(self) -> int:
    """Rows that one expert takes from one group: C = ceil(capacity_factor x A x M / E), at most M."""
    balanced = self.experts_per_token * self.group_size / self.num_experts
    return min(self.group_size, max(1, math.ceil(self.capacity_factor * balanced - 1e-9)))
