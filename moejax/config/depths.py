"""Mixture of depths: layers that only some tokens go through. `moejax/models/depths.py` implements them."""

import dataclasses
import math

from moejax.config import checks
from moejax.config.kinds import OfSeveralKinds
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depths(OfSeveralKinds, default="all"):
  """Base class of mixtures of depths. `Depths()` returns `AllTokens()`, the default."""

  # Fields of some kinds, with their values in the other kinds.

  every = 0
  """Every n-th layer is routed. 0: none."""
  share = 1.0
  """Maximum fraction of the tokens of a sequence that go through a routed layer in training."""
  has_predictor = False
  """Whether routed layers have parameters to predict choices that depend on later tokens."""

  @property
  def is_routed(self) -> bool:
    """Whether tokens can skip layers."""
    return self.every > 0

  def slots(self, sequence_length: int) -> int:
    """Maximum number of tokens of a sequence that go through a routed layer in training (C)."""
    return min(sequence_length, max(1, math.ceil(self.share * sequence_length - 1e-9)))

  def causal(self) -> "Depths":
    """The kind for evaluation and text generation, in which the choice of a token does not depend on other tokens."""
    return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllTokens(Depths, kind="all"):
  """Every token goes through every layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Routed:
  """The field of all kinds with routed layers."""

  every: int = 2
  """Every n-th layer is routed, of those after `moe.leading_dense`. 1: all of them; 2: the second, fourth, ..."""

  def __post_init__(self) -> None:
    checks.positive(self, "every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Limited(_Routed):
  """Fields of kinds for training."""

  share: float = 0.125
  """Maximum fraction of the tokens of a sequence that go through a routed layer in training. Others skip it by the
  residual stream."""

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.positive(self, "share")
    checks.between(self, "share", 0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKDepths(_Limited, Depths, kind="top_k"):
  """A routed layer processes the tokens of each sequence with the largest router outputs, which are also the weights
  of its change of the residual stream (mixture of depths, arXiv 2404.02258). Whether a token is among them depends on
  later tokens, so a predictor, which is trained beside, replaces this choice in evaluation and text generation."""

  has_predictor = True

  def causal(self) -> Depths:
    return PredictedDepths(every=self.every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictedDepths(_Routed, Depths, kind="predicted"):
  """What `TopKDepths` is in evaluation and text generation: a token goes through a routed layer if the predictor gives
  it a probability above 0.5. Not for training."""

  has_predictor = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdDepths(_Limited, Depths, kind="threshold"):
  """A token goes through a routed layer if the sigmoid of its router's output is at least the threshold. This gate is
  also the weight of the layer's change of the residual stream (MoDification, arXiv 2410.14268). In training, tokens
  beyond `share` of a sequence skip the layer, the last ones first; evaluation and text generation have no limit."""

  threshold: float = 0.5
  """Minimum gate."""

  def causal(self) -> Depths:
    return dataclasses.replace(self, share=1.0)

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.positive(self, "threshold")
    if self.threshold >= 1.0:
      raise UserError(f"depths.threshold={self.threshold} must be below 1, the largest gate")
