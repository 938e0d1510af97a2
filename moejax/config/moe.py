"""Sparse layers: the number and width of experts, the router, and the dispatch of tokens to experts."""

import dataclasses
import math
from typing import Literal, get_args

from moejax.config import checks
from moejax.config.dispatch import Dispatch
from moejax.config.plain import typed
from moejax.config.router import Router
from moejax.errors import UserError

WeightsOn = Literal["outputs", "inputs"]

BALANCE_LOSSES = ("load_balance", "sequence_balance", "global_balance")
LOSSES_OF_SPARSE_LAYERS = (*BALANCE_LOSSES, "router_z", "mutual_information")
"""Fields of training.losses that need a sparse layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
  """The sparse feed-forward layers of a model."""

  num_experts: int
  """Number of experts in a sparse layer (E)."""
  experts_per_token: int
  """Number of experts per token (A, top-k). For top_p it is the maximum, for expert_choice the mean."""
  d_ff: int
  """Hidden dimension of one expert (F)."""
  every: int = 1
  """Every n-th layer is sparse. 1: all layers; 2: the second, fourth, ... layer."""
  leading_dense: int = 0
  """Number of dense layers before the first sparse one. `every` counts the layers after them (DeepSeek-V3: 3)."""
  num_shared_experts: int = 0
  """Number of experts of the same width that process every token (DeepSeekMoE, arXiv 2401.06066)."""
  shared_gate: bool = False
  """Whether the output of the shared experts is multiplied by a sigmoid gate (Qwen2-MoE)."""
  bias: bool = False
  """Whether the router and each matrix of the routed experts have a bias (gpt-oss)."""
  weights_on: WeightsOn = "outputs"
  """Whether the weight of a choice multiplies the output of the expert or, where each token has one expert, its input
  (Llama 4)."""
  router: Router = Router()
  """The router, which selects the experts of each token and their weights. In Python, the kind alone, such as "dense",
  selects a router with default fields."""
  dispatch: Dispatch = Dispatch()
  """The dispatch, which moves tokens to their experts and back. In Python, the kind alone, such as "grouped", selects a
  dispatch with default fields."""
  capacity_factor: float = 1.0
  """Capacity of an expert per group, as a multiple of the balanced load A x M / E. GShard and arXiv 2405.15052 multiply
  M / E instead: their 2.0 with top-2 is 1.0 here. Used by dispatch einsum and by router expert_choice."""
  group_size: int | None = None
  """Number of tokens in a routing group (M). Tokens of a group compete for capacity, and the load-balancing loss is
  computed per group. It does not depend on the mesh, so the same tokens are dropped on every mesh. Dispatch masks have
  capacity_factor x A x M^2 elements per group. If None, it is derived from the shape of the model (`group_tokens`)."""

  def __post_init__(self) -> None:
    object.__setattr__(self, "router", typed(Router, self.router, "moe.router"))
    object.__setattr__(self, "dispatch", typed(Dispatch, self.dispatch, "moe.dispatch"))
    checks.positive(self, "num_experts", "experts_per_token", "d_ff", "every", "capacity_factor")
    checks.not_negative(self, "num_shared_experts", "leading_dense")
    self._check_effect("shared_gate", self.num_shared_experts > 0, "num_shared_experts above 0 makes shared experts")
    if self.group_size is not None:
      checks.positive(self, "group_size")
    if self.experts_per_token > self.num_experts:
      raise UserError(
        f"moe.experts_per_token={self.experts_per_token} is more than moe.num_experts={self.num_experts}; "
        f"use at most {self.num_experts}"
      )
    self.router.check_layer(self.num_experts, self.experts_per_token)
    self._check_weights()
    self._check_effect("capacity_factor", self.has_capacity, "dispatch einsum and router expert_choice have a capacity")

  def _check_weights(self) -> None:
    checks.one_of(self, "weights_on", get_args(WeightsOn))
    if self.weights_on == "inputs" and (self.experts_per_token > 1 or self.router.every_expert):
      raise UserError(
        f"moe.weights_on='inputs' needs one expert per token, and moe.experts_per_token={self.experts_per_token} with "
        f"router.kind={self.router.kind!r} may have several; set experts_per_token to 1 with router.kind='top_k', or "
        "weights_on to 'outputs'"
      )

  @property
  def has_capacity(self) -> bool:
    """Whether experts have a limited capacity."""
    return self.dispatch.has_capacity or self.router.has_capacity

  @property
  def has_order(self) -> bool:
    """Whether the choices of a token are ranked, and it has several."""
    return self.experts_per_token > 1 and not self.router.every_expert

  @property
  def has_groups(self) -> bool:
    """Whether routing groups have an effect."""
    return self.has_capacity or "load_balance" in self.losses

  def _check_effect(self, name: str, counts: bool, where: str) -> None:
    default = {field.name: field.default for field in dataclasses.fields(self)}[name]
    if not counts and getattr(self, name) != default:
      raise UserError(f"moe.{name}={getattr(self, name)} would have no effect: only {where}; set it to {default}")

  def check_combinations(self) -> None:
    """Checks that every field has an effect. An experiment checks this for its model.

    Raises:
      UserError: If a field would have no effect.
    """
    router, E, A = self.router, self.num_experts, self.experts_per_token
    self._check_effect("group_size", self.has_groups, "a capacity and the load_balance loss use groups")
    self.dispatch.check_effect(self.has_order)
    router.check_effect(E, A)
    takes_all = router.takes_all(E, A, self.capacity_factor)
    # With a capacity, noise still affects which choice comes first.
    in_order = self.dispatch.looks_ahead and self.has_order
    for name, counts in (("bias_rate", False), ("gumbel", in_order)):
      if takes_all and not counts and getattr(router, name):
        raise UserError(
          f"router.{name}={getattr(router, name)} would have no effect with moe.experts_per_token={A} of {E} experts: "
          "every token is sent to all of them; set it to 0 or lower experts_per_token"
        )

  def group_tokens(self, sequence_length: int) -> int:
    """Number of tokens in a group (M): group_size or, if it is None, the divisor of the sequence length that is closest
    to the formula below.

    The two products with dispatch masks cost 2/3 x capacity_factor x M / F times the FLOPs of the experts, so M should
    be small compared with the hidden dimension F. Loads are uneven if an expert gets fewer than about 8 rows of a
    group. Therefore M = max(F / 8, 8 E / A).
    """
    if self.group_size is not None:
      return self.group_size
    wanted = max(self.d_ff / 8, 8 * self.num_experts / self.experts_per_token)
    below = [m for m in range(1, math.isqrt(sequence_length) + 1) if sequence_length % m == 0]
    divisors = (*below, *(sequence_length // m for m in below))
    return min(divisors, key=lambda m: (abs(math.log(m / wanted)), m))

  def capacity(self, group_tokens: int) -> int:
    """Capacity of one expert in one group: C = ceil(capacity_factor x A x M / E), at most M."""
    balanced = self.experts_per_token * group_tokens / self.num_experts
    return min(group_tokens, max(1, math.ceil(self.capacity_factor * balanced - 1e-9)))

  def choices_per_token(self, group_tokens: int) -> float:
    """Mean number of experts per token or, for routers that may choose fewer (top_p), the maximum."""
    if self.router.has_capacity:
      return self.num_experts * self.capacity(group_tokens) / group_tokens
    return self.experts_per_token

  def fine_grained(self, granularity: int) -> "MoE":
    """Returns a layer with finer experts and the same parameters and FLOPs (arXiv 2402.07871, with G = `granularity`):
    experts of 1/G of the width, G times as many experts, and G times as many per token.

    Raises:
      UserError: If the width is not divisible by granularity.
    """
    checks.divides(granularity, "granularity", self.d_ff, "moe.d_ff")
    return dataclasses.replace(
      self,
      num_experts=self.num_experts * granularity,
      experts_per_token=self.experts_per_token * granularity,
      num_shared_experts=self.num_shared_experts * granularity,
      d_ff=self.d_ff // granularity,
    )

  @property
  def losses(self) -> tuple[str, ...]:
    """The members of LOSSES_OF_SPARSE_LAYERS that the layer returns. A router that always balances the load has no
    load-balancing losses."""
    balanced = self.router.balanced
    return tuple(name for name in LOSSES_OF_SPARSE_LAYERS if not (balanced and name in BALANCE_LOSSES))

  @property
  def cautions(self) -> tuple[str, ...]:
    """Warnings to show before training a decoder, one line each."""
    if self.router.looks_ahead:
      return (
        f"router.kind={self.router.kind} is not causal: the experts of a token depend on later tokens, so the held-out "
        "scores of a decoder are too good and generation differs from training; use it only for encoders",
      )
    if self.dispatch.looks_ahead and self.has_order:
      return (
        f"dispatch.kind={self.dispatch.kind} is not strictly causal: the first choice of a later token can displace "
        "the second choice of an earlier one (GShard); dispatch.priority=token and dispatch grouped are causal",
      )
    return ()
