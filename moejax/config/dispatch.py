"""Dispatches, which bring tokens to their experts and back. `moejax/models/moe/dispatch.py` has their functions."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from moejax.config import checks
from moejax.config.kinds import OfSeveralKinds
from moejax.config.resume import RUN_MAY_CHANGE
from moejax.config.sharding import Mesh, Rules, axes_of
from moejax.errors import UserError

Priority = Literal["choice", "token"]
Exchange = Literal["all_to_all", "all_gather"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatch(OfSeveralKinds, default="einsum"):
  """Facts of every dispatch. `Dispatch(...)` returns `EinsumDispatch(...)`, the default.

  To add a dispatch, subclass this, override the facts that differ, and add its function to
  `moejax.models.moe.dispatch.DISPATCHES`.
  """

  # Facts, which a kind overrides by `has_capacity = True`.

  has_capacity = False
  """Whether an expert takes at most its capacity of the tokens of a group."""
  looks_ahead = False
  """Whether a later token can displace the choice of an earlier one, so that predictions are not strictly causal."""
  has_masks = False
  """Whether it multiplies by masks of the size tokens x capacity, whose FLOPs a plan counts."""

  def check_effect(self, has_order: bool) -> None:
    """Checks that each field has an effect in the sparse layer. An experiment checks this for its model.

    Args:
      has_order: whether a token has first and second choices.

    Raises:
      UserError: a field would have no effect.
    """

  def without_drops(self) -> "Dispatch":
    """The dispatch with which a model generates and scores text: what a token gets depends on no other token."""
    return GroupedDispatch() if self.has_capacity else self

  @property
  def exchange_fields(self) -> Mapping[str, Any]:
    """Fields that are set and have an effect only on a mesh on which rows are exchanged between devices."""
    return {}

  def check_rules(self, rules: Rules, mesh: Mesh) -> None:
    """Checks that the dispatch computes what the sharding rules ask for.

    Raises:
      UserError: it does not.
    """

  def activations(self, *, O: int, U: int, M: int, C: int, E: int, D: int, F: int) -> Iterator[dict[str, int]]:
    """Sizes of the dimensions of each array that it places, by logical axis, so that rules are checked early.

    Args:
      O: outer batches.
      U: routing groups in each.
      M: tokens in a group.
      C: capacity of an expert in a group.
      E: experts.
      D: width of the residual stream.
      F: hidden dimension of an expert.
    """
    yield from ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EinsumDispatch(Dispatch, kind="einsum"):
  """Dispatch masks, sharded as in Table 1 of arXiv 2405.15052. Tokens beyond an expert's capacity are dropped."""

  priority: Priority = "choice"
  """Which tokens an expert at capacity takes. choice: all first choices before any second choice (GShard); a later
  token may displace an earlier one, so predictions are not strictly causal. token: earlier tokens first; predictions
  are causal."""

  has_capacity = has_masks = True

  def __post_init__(self) -> None:
    checks.one_of(self, "priority", get_args(Priority))

  @property
  def looks_ahead(self) -> bool:  # type: ignore[override]
    return self.priority == "choice"

  def check_effect(self, has_order: bool) -> None:
    if self.priority == "token" and not has_order:
      raise UserError(
        "dispatch.priority=token would have no effect: only a router that ranks more than one choice of a token has "
        "second choices; set it to choice"
      )

  def activations(self, *, O: int, U: int, M: int, C: int, E: int, D: int, F: int) -> Iterator[dict[str, int]]:
    yield {"outer": O, "groups": U, "group_tokens": M, "capacity": C}
    yield {"outer": O, "groups": U * C, "act_embed": D}
    yield {"outer": O, "experts": E, "act_embed": D}
    yield {"experts": E, "outer": O * U * C, "act_embed": D}
    yield {"experts": E, "outer": O * U * C, "expert_mlp": F}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedDispatch(Dispatch, kind="grouped"):
  """Rows sorted by expert and grouped matrix products. Nothing is dropped, except by a receive_factor."""

  exchange: Exchange = dataclasses.field(default="all_to_all", metadata=RUN_MAY_CHANGE)
  """How rows are exchanged over the expert axis. all_to_all: each row is sent to the device of its expert. all_gather:
  all tokens are sent to all devices, which moves less data if experts_per_token is close to the size of the axis."""
  receive_factor: float | None = None
  """For all_to_all: maximum number of rows that a device can receive, as a multiple of the balanced load (the choices
  of its tokens). Rows beyond it are dropped and counted; which ones depends on the mesh. None allocates the worst case,
  and no value allocates more."""

  def __post_init__(self) -> None:
    checks.one_of(self, "exchange", get_args(Exchange))
    if self.receive_factor is None:
      return
    checks.positive(self, "receive_factor")
    if self.exchange != "all_to_all":
      raise UserError(
        f"dispatch.receive_factor={self.receive_factor} would have no effect with dispatch.exchange={self.exchange}, "
        "which receives all rows; set it to None"
      )

  def without_drops(self) -> Dispatch:
    return dataclasses.replace(self, receive_factor=None)

  @property
  def exchange_fields(self) -> Mapping[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(self)}
    return {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}

  def check_rules(self, rules: Rules, mesh: Mesh) -> None:
    hidden, embed = (
      tuple(axis for axis in axes_of(rules, mesh, name) if mesh.shape[axis] > 1) for name in ("expert_mlp", "act_embed")
    )
    if embed not in ((), hidden):
      raise UserError(
        f"dispatch grouped adds up parts of expert_mlp (on {' x '.join(hidden) or 'no axis'}) into shards of act_embed "
        f"(on {' x '.join(embed)}); let both rules name the same mesh axes, or act_embed none"
      )

  def activations(self, *, O: int, U: int, M: int, C: int, E: int, D: int, F: int) -> Iterator[dict[str, int]]:
    yield {"experts": E, "expert_embed": D, "expert_mlp": F}
    yield {"outer": O, "groups": U, "group_tokens": M, "expert_mlp": F}  # within one device's own computation


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseDispatch(Dispatch, kind="dense"):
  """Every expert on every token, which is num_experts / experts_per_token times the work. DS-MoE is trained in this way
  (arXiv 2404.05567)."""

  def activations(self, *, O: int, U: int, M: int, C: int, E: int, D: int, F: int) -> Iterator[dict[str, int]]:
    yield {"outer": O, "groups": U, "group_tokens": M, "expert_mlp": F}
