"""Routers, which select the experts of each token and their weights. `moejax/models/moe/router.py` implements them."""

import dataclasses
from typing import Literal, get_args

from moejax.config import checks
from moejax.config.kinds import OfSeveralKinds
from moejax.errors import UserError

Scores = Literal["softmax", "sigmoid"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router(OfSeveralKinds, default="top_k", functions="moejax.models.moe.router.ROUTERS"):
  """Base class of routers. `Router(...)` returns `TopKRouter(...)`, the default. Logits, scores and losses are float32
  for every compute dtype.

  To add a router, subclass this, override the properties that differ, and add its function to
  `moejax.models.moe.router.ROUTERS`.
  """

  scale: float = 1.0
  """Factor by which all weights are multiplied, after renormalization (DeepSeek-V3: 2.5)."""
  jitter: float = 0.0
  """In training, the router's input is multiplied by uniform noise in [1 - jitter, 1 + jitter] (Switch, arXiv
  2101.03961)."""

  # Properties, which a subclass overrides, as in `balanced = True`.

  balanced = False
  """Whether all experts always have the same load, so that there are no load-balancing losses."""
  looks_ahead = False
  """Whether the experts of a token depend on later tokens, so that the model cannot generate text."""
  every_expert = False
  """Whether the routing of a token lists all experts, in order, and marks the chosen ones. Otherwise it lists at most
  experts_per_token experts, the best first."""
  has_capacity = False
  """Whether each expert chooses as many tokens as its capacity, independently of the dispatch."""

  # Fields of some kinds, with their values in the other kinds.

  scores = "softmax"
  """How logits are converted to probabilities, for losses and metrics."""
  renormalize = False
  """Whether the weights of the chosen experts are normalized to sum to 1."""
  gumbel = 0.0
  """Scale of the Gumbel noise that is added to logits in training."""
  bias_rate = 0.0
  """Update rate of the bias of each expert."""

  def __post_init__(self) -> None:
    checks.positive(self, "scale")
    checks.below_one(self, "jitter")

  def check_layer(self, num_experts: int, experts_per_token: int) -> None:
    """Checks that the fields are compatible with those of the sparse layer.

    Raises:
      UserError: If they are not.
    """

  def check_effect(self, num_experts: int, experts_per_token: int) -> None:
    """Checks that each field has an effect in the sparse layer. An experiment checks this for its model.

    Raises:
      UserError: If a field would have no effect.
    """

  def takes_all(self, num_experts: int, experts_per_token: int, capacity_factor: float) -> bool:
    """Whether every token is sent to every expert."""
    return False

  @property
  def is_noisy(self) -> bool:
    """Whether training draws random numbers."""
    return self.without_noise() != self

  def without_noise(self) -> "Router":
    """The router without noise, as used outside training."""
    own = {field.name for field in dataclasses.fields(self)}
    return dataclasses.replace(self, **dict.fromkeys(own & {"jitter", "gumbel"}, 0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
  """Fields of routers that choose by scores, as in `class TopKRouter(Scoring, Router)`."""

  scores: Scores = "softmax"
  """softmax over all experts, or an independent sigmoid for each expert (DeepSeek-V3). Sigmoid scores are normalized to
  sum to 1 only for losses."""
  gumbel: float = 0.0
  """In training, Gumbel noise times this value is added to each logit. At 1, the choice is a sample from the
  softmax."""

  def __post_init__(self) -> None:
    super().__post_init__()  # type: ignore[misc]  # of the router
    checks.one_of(self, "scores", get_args(Scores))
    checks.not_negative(self, "gumbel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKRouter(Scoring, Router, kind="top_k"):
  """Each token chooses its best experts_per_token experts (GShard, Switch, DeepSeek-V3)."""

  renormalize: bool = True
  """Whether the weights of the chosen experts are normalized to sum to 1 (GShard), or equal the scores (Switch)."""
  bias_rate: float = 0.0
  """Bias update rate of auxiliary-loss-free load balancing (arXiv 2408.15664; DeepSeek-V3: 0.001). After each step, the
  bias of an expert is increased by this value if its load is below the mean, and decreased if it is above. The bias
  affects which experts are chosen, not their weights. 0: no bias."""
  expert_groups: int = 1
  """Number of equal groups of experts. A token chooses its experts from its best groups_per_token groups (DeepSeek-V3,
  arXiv 2412.19437, section 2.1.2)."""
  groups_per_token: int = 1
  """Number of groups that the experts of a token may come from."""
  skip_below: float = 0.0
  """A choice is skipped if its score is less than this fraction of the score of the token's first choice (arXiv
  2402.14800, section 3.3). 0: none is skipped."""

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.positive(self, "expert_groups", "groups_per_token")
    checks.not_negative(self, "bias_rate")
    checks.between(self, "skip_below", 0.0, 1.0)
    if self.groups_per_token > self.expert_groups:
      raise UserError(
        f"router.groups_per_token={self.groups_per_token} is more than router.expert_groups={self.expert_groups}; "
        f"use at most {self.expert_groups}"
      )
    if self.groups_per_token == self.expert_groups > 1:
      raise UserError(
        f"router.expert_groups={self.expert_groups} would have no effect with router.groups_per_token="
        f"{self.groups_per_token}: a token may choose from all groups; lower groups_per_token or set both to 1"
      )

  def check_layer(self, num_experts: int, experts_per_token: int) -> None:
    if self.renormalize and experts_per_token == 1:
      raise UserError(
        "router.renormalize=True with moe.experts_per_token=1 makes every weight 1, so the router would receive no "
        "gradient from the cross-entropy; set it to False"
      )
    checks.divides(self.expert_groups, "router.expert_groups", num_experts, "moe.num_experts")
    reachable = num_experts // self.expert_groups * self.groups_per_token
    if self.expert_groups > 1 and reachable < experts_per_token:
      raise UserError(
        f"moe.experts_per_token={experts_per_token} is more than the {reachable} experts in router.groups_per_token="
        f"{self.groups_per_token} groups; raise groups_per_token or lower expert_groups"
      )

  def check_effect(self, num_experts: int, experts_per_token: int) -> None:
    if self.skip_below and experts_per_token == 1:
      raise UserError(
        f"router.skip_below={self.skip_below} would have no effect with moe.experts_per_token=1, because the first "
        "choice is never skipped; set it to 0 or raise experts_per_token"
      )
    if self.expert_groups == num_experts > 1:
      raise UserError(
        f"router.expert_groups={num_experts} would have no effect with moe.num_experts={num_experts} because each "
        "group has one expert; lower expert_groups"
      )

  def takes_all(self, num_experts: int, experts_per_token: int, capacity_factor: float) -> bool:
    return experts_per_token == num_experts and not self.skip_below


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopPRouter(Scoring, Router, kind="top_p"):
  """Each token chooses its best experts until the sum of their probabilities reaches the threshold, but at most
  experts_per_token (XMoE, arXiv 2403.18926)."""

  threshold: float
  """Experts are chosen until their probabilities sum to this value."""
  renormalize: bool = True
  """Whether the weights of the chosen experts are normalized to sum to 1, or equal the scores."""

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.positive(self, "threshold")
    checks.between(self, "threshold", 0.0, 1.0)

  def check_effect(self, num_experts: int, experts_per_token: int) -> None:
    if experts_per_token == 1:
      raise UserError(
        f"router.threshold={self.threshold} would have no effect with moe.experts_per_token=1, which selects "
        "only the best expert; raise experts_per_token or use router.kind top_k"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoiceRouter(Scoring, Router, kind="expert_choice"):
  """Each expert chooses its best tokens, up to its capacity (arXiv 2202.09368). Not causal. Weights equal the
  scores."""

  balanced = looks_ahead = every_expert = has_capacity = True

  def takes_all(self, num_experts: int, experts_per_token: int, capacity_factor: float) -> bool:
    return capacity_factor * experts_per_token >= num_experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseRouter(Router, kind="dense"):
  """Every token uses all experts, weighted by a softmax (DS-MoE, arXiv 2404.05567)."""

  balanced = every_expert = True

  def check_layer(self, num_experts: int, experts_per_token: int) -> None:
    if experts_per_token != num_experts:
      raise UserError(
        f"moe.experts_per_token={experts_per_token}, but router.kind='dense' uses all experts; set it to {num_experts}"
      )

  def takes_all(self, num_experts: int, experts_per_token: int, capacity_factor: float) -> bool:
    return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdRouter(Router, kind="threshold"):
  """Each token uses the experts whose softmax probability is more than threshold / num_experts, and always the best
  one. Weights equal the probabilities. This is the sparse inference of DS-MoE (arXiv 2404.05567, section 3.5)."""

  threshold: float = 0.48
  """Minimum probability of an expert, as a multiple of 1 / num_experts."""
  equal_counts: bool = False
  """Whether every token uses the same number of experts, its best ones: the mean over the tokens of a batch
  (Threshold-TopK). Predictions then depend on the other sequences of the batch, and on later tokens."""

  every_expert = True

  @property
  def looks_ahead(self) -> bool:  # type: ignore[override]
    return self.equal_counts

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.positive(self, "threshold")

  def check_layer(self, num_experts: int, experts_per_token: int) -> None:
    if experts_per_token != num_experts:
      raise UserError(
        f"moe.experts_per_token={experts_per_token}, but router.kind='threshold' limits no token to fewer than all "
        f"experts; set it to {num_experts}"
      )

  def check_effect(self, num_experts: int, experts_per_token: int) -> None:
    if num_experts == 1:
      raise UserError(
        f"router.threshold={self.threshold} would have no effect with moe.num_experts=1; raise num_experts"
      )
