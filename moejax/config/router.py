"""Routers, which decide the experts of a token and their weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from moejax.config import checks
from moejax.config.kinds import all_subclasses
from moejax.errors import UserError

RouterKind = Literal["top_k", "top_p", "expert_choice", "dense"]
Scores = Literal["softmax", "sigmoid"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
  """The router of a sparse layer. Its logits, scores and losses are float32 for every compute type.

  To add a router, subclass this, give `kind` a new name, override `balanced` and `looks_ahead` if needed, and add its
  function to `moejax.models.moe.router.ROUTERS`.
  """

  kind: RouterKind = "top_k"
  """top_k: each token chooses its best experts_per_token experts (GShard, Switch, DeepSeek-V3). top_p: each token
  chooses its best experts until their probabilities reach threshold, at most experts_per_token (XMoE). expert_choice:
  each expert chooses its best tokens; not causal (arXiv 2202.09368). dense: every token uses all experts (DS-MoE)."""
  scores: Scores = "softmax"
  """softmax over all experts, or an independent sigmoid for each expert (DeepSeek-V3). Sigmoid scores are normalized to
  sum to 1 only for losses."""
  renormalize: bool = True
  """Whether the weights of the chosen experts are normalized to sum to 1 (GShard), or equal the scores (Switch)."""
  scale: float = 1.0
  """Factor of every weight, applied after renormalize (DeepSeek-V3: 2.5)."""
  threshold: float | None = None
  """For top_p: experts are chosen until their probabilities sum to this value (XMoE, arXiv 2403.18926)."""
  bias_rate: float = 0.0
  """For top_k: bias update rate of auxiliary-loss-free load balancing (arXiv 2408.15664; DeepSeek-V3: 0.001). After
  each step, the bias of an expert rises by it if its load is below the mean and falls by it if its load is above. The
  bias affects which experts are chosen, not their weights. 0: no bias."""
  expert_groups: int = 1
  """For top_k: number of equal groups of experts. A token chooses its experts from its best groups_per_token groups
  (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
  groups_per_token: int = 1
  """Number of groups that the experts of a token may come from."""
  jitter: float = 0.0
  """In training, the router's input is multiplied by uniform noise in [1 - jitter, 1 + jitter] (Switch, arXiv
  2101.03961)."""
  gumbel: float = 0.0
  """In training, Gumbel noise times this value is added to each logit. At 1, the choice is a sample from the
  softmax."""

  def __post_init__(self):
    if type(self) is Router:
      checks.one_of(self, "kind", get_args(RouterKind))
    elif self.kind in get_args(RouterKind):
      raise UserError(
        f"router.kind={self.kind!r} of {type(self).__name__} is the name of a built-in router; use another name"
      )
    elif self.gumbel:
      raise UserError(
        f"router.gumbel={self.gumbel} has no effect with router.kind={self.kind!r}: only moejax's own routers draw it; "
        "set it to 0"
      )
    checks.one_of(self, "scores", get_args(Scores))
    checks.positive(self, "scale", "expert_groups", "groups_per_token")
    checks.not_negative(self, "bias_rate", "gumbel")
    checks.below_one(self, "jitter")
    if (self.threshold is None) == (self.kind == "top_p"):
      raise UserError(
        f"router.threshold={self.threshold} with router.kind={self.kind!r}; "
        + ("set it to a number above 0 and at most 1" if self.kind == "top_p" else "only top_p uses it; set it to None")
      )
    if self.threshold is not None:
      checks.positive(self, "threshold")
      checks.between(self, "threshold", 0.0, 1.0)
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
    for name, without in (("bias_rate", 0.0), ("expert_groups", 1)):
      if self.kind != "top_k" and getattr(self, name) != without:
        raise UserError(
          f"router.{name}={getattr(self, name)} would have no effect with router.kind={self.kind!r}; "
          f"set it to {without} or use top_k"
        )
    if self.kind in ("expert_choice", "dense"):
      self._check_unchosen()

  def _check_unchosen(self):
    """Checks a router whose tokens do not choose: weights cannot be renormalized over the choice of a token."""
    if self.renormalize:
      raise UserError(
        f"router.renormalize=True with router.kind={self.kind!r}, whose weights equal the scores; set it to False"
      )
    if self.kind == "dense" and (self.scores != "softmax" or self.gumbel):
      raise UserError("router.kind='dense' weights experts by a softmax without noise; use scores softmax and gumbel 0")

  @classmethod
  def class_of(cls, plain: Mapping[str, Any]) -> "type[Router]":
    """The class of a router that was stored as plain data.

    Raises:
      UserError: its kind is neither a built-in router nor an imported subclass.
    """
    name = plain.get("kind", cls.kind)
    known = {subclass.kind: subclass for subclass in all_subclasses(Router)} | dict.fromkeys(
      get_args(RouterKind), Router
    )
    if name not in known:
      raise UserError(
        f"router.kind={name!r} is not one of {', '.join(known)}; to use your own router, give the file that defines it"
      )
    return known[name]

  @property
  def balanced(self) -> bool:
    """Whether all experts have equal loads by construction, so that there are no balance losses."""
    return self.kind in ("expert_choice", "dense")

  @property
  def looks_ahead(self) -> bool:
    """Whether the experts of a token depend on later tokens, so that the model cannot generate text."""
    return self.kind == "expert_choice"

  @property
  def is_noisy(self) -> bool:
    """Whether training draws random numbers."""
    return self.jitter > 0 or self.gumbel > 0
