"""Routers: which experts a token goes to, and with what weight."""

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
  """How the router of a sparse layer decides. Its logits, scores and losses are float32 whatever the compute type.

  A router of your own subclasses this, gives `kind` a name of its own, says what it is (`balanced`, `looks_ahead`), and
  has its function in `moejax.models.moe.router.ROUTERS`.
  """

  kind: RouterKind = "top_k"
  """top_k: each token takes its best experts_per_token (GShard, Switch, DeepSeek-V3); top_p: each token takes its best
  until their probabilities reach threshold, at most experts_per_token (XMoE); expert_choice: each expert takes its best
  tokens, so that a prediction depends on later tokens (arXiv 2202.09368); dense: every expert (DS-MoE)."""
  scores: Scores = "softmax"
  """softmax over all experts, or a sigmoid of each alone (DeepSeek-V3), which is scaled to sum to 1 only for losses."""
  renormalize: bool = True
  """Whether the weights of a token's chosen experts are scaled to sum to 1 (GShard) or stay scores (Switch)."""
  scale: float = 1.0
  """Times every weight, after renormalize (DeepSeek-V3: 2.5)."""
  threshold: float | None = None
  """top_p only: experts are taken until their probabilities sum to this (XMoE, arXiv 2403.18926)."""
  bias_rate: float = 0.0
  """top_k only: step by which each expert's bias rises when it has less than the mean load and falls when it has more;
  the bias decides who is chosen and not the weight (arXiv 2408.15664; DeepSeek-V3: 0.001). 0 has no bias."""
  expert_groups: int = 1
  """top_k only: experts stand in this many equal groups, and a token chooses among the best groups_per_token of them
  (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
  groups_per_token: int = 1
  """Groups of experts that a token may choose from."""
  jitter: float = 0.0
  """In training the router sees its input times 1 - jitter to 1 + jitter, uniformly (Switch, arXiv 2101.03961)."""
  gumbel: float = 0.0
  """In training each logit gets this times Gumbel noise: at 1 the choice is a sample of the softmax."""

  def __post_init__(self):
    if type(self) is Router:
      checks.one_of(self, "kind", get_args(RouterKind))
    elif self.kind in get_args(RouterKind):
      raise UserError(
        f"router.kind={self.kind!r} of {type(self).__name__} is one of moejax's own; give it another name"
      )
    checks.one_of(self, "scores", get_args(Scores))
    checks.positive(self, "scale", "expert_groups", "groups_per_token")
    checks.not_negative(self, "bias_rate", "gumbel")
    checks.below_one(self, "jitter")
    if (self.threshold is None) == (self.kind == "top_p"):
      raise UserError(
        f"router.threshold={self.threshold} with router.kind={self.kind!r}; "
        + ("give it a threshold above 0 and up to 1" if self.kind == "top_p" else "only top_p has one, set it to None")
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
        f"router.expert_groups={self.expert_groups} would do nothing with router.groups_per_token="
        f"{self.groups_per_token}: a token may choose from all groups; lower groups_per_token or set both to 1"
      )
    for name, without in (("bias_rate", 0.0), ("expert_groups", 1)):
      if self.kind != "top_k" and getattr(self, name) != without:
        raise UserError(
          f"router.{name}={getattr(self, name)} would do nothing with router.kind={self.kind!r}; "
          f"set it to {without} or use top_k"
        )
    if self.kind in ("expert_choice", "dense"):
      self._check_unchosen()

  def _check_unchosen(self):
    """Where a token does not choose, nothing can be renormalised over its choice, and only probabilities weigh."""
    if self.renormalize:
      raise UserError(
        f"router.renormalize=True with router.kind={self.kind!r}, whose weights stay scores; set it to False"
      )
    if self.kind == "dense" and (self.scores != "softmax" or self.gumbel):
      raise UserError("router.kind='dense' weighs experts by a softmax without noise; use scores softmax and gumbel 0")

  @classmethod
  def class_of(cls, plain: Mapping[str, Any]) -> "type[Router]":
    """The class of a router that was stored as plain data.

    Raises:
      UserError: its kind is neither one of moejax's own nor that of a subclass that is known.
    """
    name = plain.get("kind", cls.kind)
    known = {subclass.kind: subclass for subclass in all_subclasses(Router)} | dict.fromkeys(
      get_args(RouterKind), Router
    )
    if name not in known:
      raise UserError(
        f"router.kind={name!r} is not one of {', '.join(known)}; one of your own is known where the file that defines "
        "it is named"
      )
    return known[name]

  @property
  def balanced(self) -> bool:
    """Whether all experts are loaded alike by construction, so that there is no balance to lose."""
    return self.kind in ("expert_choice", "dense")

  @property
  def looks_ahead(self) -> bool:
    """Whether a token's experts depend on later tokens, so that the model cannot generate."""
    return self.kind == "expert_choice"

  @property
  def is_noisy(self) -> bool:
    """Whether training draws random numbers."""
    return self.jitter > 0 or self.gumbel > 0
