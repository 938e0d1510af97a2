"""Feed-forward layers of dense layers. `moejax/models/feed_forward.py` implements them."""

import dataclasses
import math
from collections.abc import Mapping

from moejax.config.kinds import OfSeveralKinds, described
from moejax.errors import UserError

Shape = Mapping[str | None, int]
"""Size of each dimension of an array by its logical axis. The axis None is not sharded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForward(OfSeveralKinds, default="mlp", functions="moejax.models.feed_forward.FEED_FORWARDS"):
  """Base class of feed-forward layers. `FeedForward()` returns `MLP()`, the default. The output of a token must depend
  only on that token.

  To add a layer, subclass this, define `shapes`, and add its module to `moejax.models.feed_forward.FEED_FORWARDS`.
  """

  def shapes(self, d_model: int, d_ff: int, gated: bool) -> Mapping[str, Shape]:
    """Shape of each parameter by its name. The logical axis of d_model is embed, that of the hidden dimension mlp.

    Args:
      d_model: width of the residual stream.
      d_ff: hidden dimension.
      gated: whether model.activation multiplies by a gate.
    """
    raise UserError(f"{described(type(self))} does not define shapes; define it as FeedForward.shapes says")

  def parameters(self, d_model: int, d_ff: int, gated: bool) -> int:
    """Number of parameters of one layer."""
    return sum(math.prod(shape.values()) for shape in self.shapes(d_model, d_ff, gated).values())

  def flops_per_token(self, d_model: int, d_ff: int, gated: bool) -> int:
    """FLOPs of one layer to train on one token. The default is 6 per parameter."""
    return 6 * self.parameters(d_model, d_ff, gated)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP(FeedForward, kind="mlp"):
  """One hidden layer of d_ff units with model.activation."""

  def shapes(self, d_model: int, d_ff: int, gated: bool) -> Mapping[str, Shape]:
    up: Shape = {"embed": d_model, "mlp": d_ff}
    down: Shape = {"mlp": d_ff, "embed": d_model}
    return ({"gate": up} if gated else {}) | {"up": up, "down": down}
