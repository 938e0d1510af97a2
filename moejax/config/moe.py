"""Sparse layers: how many experts, how wide, who chooses them, and how tokens reach them."""

import dataclasses
import math
from typing import Literal, get_args

from moejax.config import checks
from moejax.config.router import Router
from moejax.errors import UserError

Dispatch = Literal["einsum", "grouped", "dense"]
Exchange = Literal["all_to_all", "all_gather"]
Priority = Literal["choice", "token"]

BALANCE_LOSSES = ("load_balance", "sequence_balance", "global_balance")
LOSSES_OF_SPARSE_LAYERS = (*BALANCE_LOSSES, "router_z", "mutual_information")
"""Fields of training.losses that need a sparse layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
  """The sparse feed-forward layers of a model."""

  num_experts: int
  """Experts in a sparse layer (E)."""
  experts_per_token: int
  """Experts that each token is sent to (A, top-k); of top_p the most, of expert_choice the mean."""
  d_ff: int
  """Hidden width of one expert."""
  every: int = 1
  """Every n-th layer is sparse, beginning with layer n: 1 makes all layers sparse, 2 the second, fourth, ..."""
  num_shared_experts: int = 0
  """Experts of the same width that every token passes beside its own (DeepSeekMoE, arXiv 2401.06066)."""
  router: Router = Router()
  """Which experts a token goes to, and with what weight."""
  dispatch: Dispatch = "einsum"
  """How tokens reach experts. einsum: capacity masks, sharded as Table 1 of arXiv 2405.15052, drops what is beyond the
  capacity; grouped: rows sorted by expert and grouped matrix products, drops nothing; dense: every expert on every
  token, E / A times the work, as DS-MoE trains (arXiv 2404.05567)."""
  capacity_factor: float = 1.0
  """Rows that an expert takes per group, as a multiple of the balanced load A x M / E. GShard and arXiv 2405.15052
  multiply M / E instead: their 2.0 with top-2 is 1.0 here. For dispatch einsum, and for expert_choice."""
  group_size: int | None = None
  """Tokens that compete for one capacity (M), and over which the balance loss is taken. A property of the experiment
  and never of the mesh, so that the same tokens are dropped on every mesh. Masks hold capacity_factor x A x M^2
  elements a group. None derives it from the shape (`group_tokens`)."""
  priority: Priority = "choice"
  """Who takes the rows of an expert that is full: choice gives them to all first choices before any second choice
  (GShard), so that a later token may push out an earlier one, which then depends on what it is to predict; token gives
  them to earlier tokens first, and no prediction depends on a later token."""
  exchange: Exchange = "all_to_all"
  """grouped only: over the expert axis each row goes to the device of its expert (all_to_all), or all tokens go to all
  devices and each computes its own experts' part (all_gather), which is less traffic when A is near the axis' size."""
  receive_factor: float | None = None
  """grouped with all_to_all only: rows that a device can receive, as a multiple of the balanced load
  (`choices_per_token` for each of its tokens); what is beyond is dropped and counted, and depends on the mesh. None has
  room for the worst case, and no more is ever reserved."""

  def __post_init__(self):
    checks.one_of(self, "dispatch", get_args(Dispatch))
    checks.one_of(self, "exchange", get_args(Exchange))
    checks.one_of(self, "priority", get_args(Priority))
    checks.positive(self, "num_experts", "experts_per_token", "d_ff", "every", "capacity_factor")
    checks.not_negative(self, "num_shared_experts")
    for name in ("group_size", "receive_factor"):
      if getattr(self, name) is not None:
        checks.positive(self, name)
    if self.experts_per_token > self.num_experts:
      raise UserError(
        f"moe.experts_per_token={self.experts_per_token} is more than moe.num_experts={self.num_experts}; "
        f"use at most {self.num_experts}"
      )
    self._check_router()
    self._check_without_effect()

  def _check_router(self):
    router, E, A = self.router, self.num_experts, self.experts_per_token
    if router.kind == "dense" and A != E:
      raise UserError(f"moe.experts_per_token={A} with router.kind='dense', which takes all experts; set it to {E}")
    if router.kind == "top_k" and router.renormalize and A == 1:
      raise UserError(
        "router.renormalize=True with moe.experts_per_token=1 makes every weight 1, and the router would learn nothing "
        "from the text; set it to False"
      )
    checks.divides(router.expert_groups, "router.expert_groups", E, "moe.num_experts")
    reachable = E // router.expert_groups * router.groups_per_token
    if router.expert_groups > 1 and reachable < A:
      raise UserError(
        f"moe.experts_per_token={A} is more than the {reachable} experts of router.groups_per_token="
        f"{router.groups_per_token} groups; raise groups_per_token or lower expert_groups"
      )

  @property
  def has_capacity(self) -> bool:
    """Whether an expert's rows are limited."""
    return self.dispatch == "einsum" or self.router.kind == "expert_choice"

  @property
  def has_order(self) -> bool:
    """Whether a token has first and second choices."""
    return self.router.kind in ("top_k", "top_p") and self.experts_per_token > 1

  @property
  def has_groups(self) -> bool:
    """Whether anything is limited or averaged by routing group."""
    return self.has_capacity or "load_balance" in self.losses

  def _check_without_effect(self):
    """A setting that would silently do nothing is an error."""
    ragged = self.dispatch == "grouped" and self.exchange == "all_to_all"
    for name, counts, where in (
      ("capacity_factor", self.has_capacity, "dispatch einsum and router expert_choice have a capacity"),
      ("priority", self.dispatch == "einsum", "dispatch einsum has a capacity that choices compete for"),
      ("exchange", self.dispatch == "grouped", "dispatch grouped exchanges rows"),
      ("receive_factor", ragged, "dispatch grouped with exchange all_to_all receives rows"),
    ):
      self._check_effect(name, counts, where)

  def _check_effect(self, name: str, counts: bool, where: str):
    default = {field.name: field.default for field in dataclasses.fields(self)}[name]
    if not counts and getattr(self, name) != default:
      raise UserError(f"moe.{name}={getattr(self, name)} would do nothing: only {where}; set it to {default}")

  def check_combinations(self):
    """Checks that each field that is set can change something beside the others, as an experiment does for its model.

    Raises:
      UserError: a field that would do nothing.
    """
    for name, counts, where in (
      ("priority", self.has_order, "routers top_k and top_p with experts_per_token above 1 have second choices"),
      ("group_size", self.has_groups, "a capacity and a balance loss are taken in groups"),
    ):
      self._check_effect(name, counts, where)
    router, E, A = self.router, self.num_experts, self.experts_per_token
    if router.kind == "top_p" and A == 1:
      raise UserError(
        f"router.threshold={router.threshold} would do nothing with moe.experts_per_token=1, which takes the best "
        "expert alone; raise experts_per_token or use router.kind top_k"
      )
    if router.expert_groups == E > 1:
      raise UserError(
        f"router.expert_groups={E} would do nothing with moe.num_experts={E}: each group is one expert; lower "
        "expert_groups"
      )
    takes_all = (router.kind == "top_k" and A == E) or (
      router.kind == "expert_choice" and self.capacity_factor * A >= E
    )
    # Even then noise decides whose choice comes first in a queue of first choices.
    in_order = self.dispatch == "einsum" and self.priority == "choice" and router.kind == "top_k"
    for name, counts in (("bias_rate", False), ("gumbel", in_order)):
      if takes_all and not counts and getattr(router, name):
        raise UserError(
          f"router.{name}={getattr(router, name)} would do nothing with moe.experts_per_token={A} of {E} experts: "
          "every token is sent to all of them; set it to 0 or lower experts_per_token"
        )

  def group_tokens(self, sequence_length: int) -> int:
    """Tokens in a group (M): group_size, or the divisor of the sequence length that is nearest to what theory derives.

    The two mask products cost 2/3 x capacity_factor x M / F of the experts' own, so M should be small beside the hidden
    width F, and an expert needs at least 8 rows of a group for its load to be even: M = max(F / 8, 8 E / A).
    """
    if self.group_size is not None:
      return self.group_size
    wanted = max(self.d_ff / 8, 8 * self.num_experts / self.experts_per_token)
    divisors = [m for m in range(1, sequence_length + 1) if sequence_length % m == 0]
    return min(divisors, key=lambda m: (abs(math.log(m / wanted)), m))

  def capacity(self, group_tokens: int) -> int:
    """Rows that one expert takes from one group: C = ceil(capacity_factor x A x M / E), at most M."""
    balanced = self.experts_per_token * group_tokens / self.num_experts
    return min(group_tokens, max(1, math.ceil(self.capacity_factor * balanced - 1e-9)))

  def choices_per_token(self, group_tokens: int) -> float:
    """Experts that a token is sent to in the mean, or at most where the router leaves it open (top_p)."""
    if self.router.kind == "expert_choice":
      return self.num_experts * self.capacity(group_tokens) / group_tokens
    return self.experts_per_token

  def fine_grained(self, granularity: int) -> "MoE":
    """The same parameters and FLOPs in experts of a `granularity`-th of the width, that many times as many, of which a
    token takes that many times as many (G of arXiv 2402.07871).

    Raises:
      UserError: granularity does not divide the width.
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
    """Those of LOSSES_OF_SPARSE_LAYERS that it returns: where all experts are loaded alike by construction there is no
    balance to lose."""
    balanced = self.router.balanced
    return tuple(name for name in LOSSES_OF_SPARSE_LAYERS if not (balanced and name in BALANCE_LOSSES))

  @property
  def cautions(self) -> tuple[str, ...]:
    """What a user should know before training a decoder with this, a line each."""
    if self.router.looks_ahead:
      return (
        f"router.kind={self.router.kind}: whether a token is chosen depends on later tokens of its group, so held-out "
        "scores of a decoder are too good and generation differs from training (arXiv 2202.09368); use it for encoders",
      )
    if self.dispatch == "einsum" and self.priority == "choice" and self.experts_per_token > 1:
      return (
        "moe.priority=choice: a later token's first choice can push out an earlier token's second one, a slight look "
        "ahead (GShard); moe.priority=token and dispatch grouped have none",
      )
    return ()
