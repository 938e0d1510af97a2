"""Dispatches, which move tokens to their experts and back. `moejax/models/moe/dispatch.py` implements them."""

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

MAX_CHUNKS = 64
"""Largest number of chunks of an exchange. The program contains the experts once for each of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatch(OfSeveralKinds, default="einsum", functions="moejax.models.moe.dispatch.DISPATCHES"):
  """Base class of dispatches. `Dispatch(...)` returns `EinsumDispatch(...)`, the default.

  To add a dispatch, subclass this, override the properties that differ, and add its function to
  `moejax.models.moe.dispatch.DISPATCHES`.
  """

  # Properties, which a subclass overrides, as in `has_capacity = True`.

  has_capacity = False
  """Whether an expert processes at most `capacity` tokens of a group."""
  looks_ahead = False
  """Whether a later token can displace the choice of an earlier one, so that predictions are not strictly causal."""
  has_masks = False
  """Whether it multiplies by dispatch masks of size tokens x capacity, whose FLOPs a plan counts."""

  def check_effect(self, has_order: bool) -> None:
    """Checks that each field has an effect in the sparse layer. An experiment checks this for its model.

    Args:
      has_order: whether the choices of a token are ranked.

    Raises:
      UserError: If a field would have no effect.
    """

  def without_drops(self) -> "Dispatch":
    """The dispatch for generating and scoring text, in which the output of a token does not depend on other tokens."""
    return GroupedDispatch() if self.has_capacity else self

  @property
  def exchanges_in_chunks(self) -> bool:
    """Whether rows are exchanged between devices in chunks, one of which can travel while another is multiplied."""
    return False

  @property
  def exchange_fields(self) -> Mapping[str, Any]:
    """Fields that are set but have an effect only if rows are exchanged between devices."""
    return {}

  def check_rules(self, rules: Rules, mesh: Mesh) -> None:
    """Checks that the dispatch supports the sharding rules.

    Raises:
      UserError: If it does not support them.
    """

  def activations(self, *, O: int, U: int, M: int, C: int, E: int, D: int, F: int) -> Iterator[dict[str, int]]:
    """Sizes of the dimensions, by logical axis, of each array whose sharding the dispatch constrains.

    Args:
      O: outer batches.
      U: routing groups per outer batch.
      M: tokens per group.
      C: capacity of an expert per group.
      E: experts.
      D: width of the residual stream.
      F: hidden dimension of an expert.
    """
    yield from ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EinsumDispatch(Dispatch, kind="einsum"):
  """Dispatch masks, sharded as in Table 1 of arXiv 2405.15052. Tokens beyond an expert's capacity are dropped."""

  priority: Priority = "choice"
  """Which tokens an expert keeps if more choose it than its capacity. choice: all first choices before any second
  choice (GShard); a later token may displace an earlier one, so predictions are not strictly causal. token: earlier
  tokens first; predictions are causal."""

  has_capacity = has_masks = True

  def __post_init__(self) -> None:
    checks.one_of(self, "priority", get_args(Priority))

  @property
  def looks_ahead(self) -> bool:  # type: ignore[override]
    return self.priority == "choice"

  def check_effect(self, has_order: bool) -> None:
    if self.priority == "token" and not has_order:
      raise UserError(
        "dispatch.priority=token would have no effect because the router does not rank several choices per token; "
        "set it to choice"
      )

  def activations(self, *, O: int, U: int, M: int, C: int, E: int, D: int, F: int) -> Iterator[dict[str, int]]:
    yield {"outer": O, "groups": U, "group_tokens": M, "capacity": C}
    yield {"outer": O, "groups": U * C, "act_embed": D}
    yield {"outer": O, "experts": E, "act_embed": D}
    yield {"experts": E, "outer": O * U * C, "act_embed": D}
    yield {"experts": E, "outer": O * U * C, "expert_mlp": F}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedDispatch(Dispatch, kind="grouped"):
  """Sorts rows by expert and uses grouped matrix products. No tokens are dropped unless receive_factor is set."""

  exchange: Exchange = dataclasses.field(default="all_to_all", metadata=RUN_MAY_CHANGE)
  """How rows are exchanged along the expert axis. all_to_all: each row is sent to the device of its expert. all_gather:
  all tokens are sent to all devices, which moves less data if experts_per_token is close to the size of the axis."""
  exchange_chunks: int = dataclasses.field(default=1, metadata=RUN_MAY_CHANGE)
  """Number of chunks into which each device splits its tokens. The exchange of one chunk can overlap with the products
  of another. 1 exchanges all tokens at once."""
  receive_factor: float | None = None
  """For all_to_all: maximum number of rows that a device can receive, as a multiple of the balanced load (the choices
  of its tokens). Rows beyond it are dropped and counted; which ones depends on the mesh and on exchange_chunks. None
  allocates the worst case, and no value allocates more."""

  def __post_init__(self) -> None:
    checks.one_of(self, "exchange", get_args(Exchange))
    checks.between(self, "exchange_chunks", 1, MAX_CHUNKS)
    if self.receive_factor is None:
      return
    checks.positive(self, "receive_factor")
    if self.exchange != "all_to_all":
      raise UserError(
        f"dispatch.receive_factor={self.receive_factor} would have no effect with dispatch.exchange={self.exchange}, "
        "in which every device receives all rows; set it to None"
      )

  @property
  def exchanges_in_chunks(self) -> bool:
    return self.exchange_chunks > 1

  def without_drops(self) -> Dispatch:
    return dataclasses.replace(self, receive_factor=None, exchange_chunks=1)  # decoding has few tokens

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
        f"dispatch grouped cannot sum expert_mlp (on {' x '.join(hidden) or 'no axis'}) into shards of act_embed "
        f"(on {' x '.join(embed)}); use the same mesh axes in both rules, or () for act_embed"
      )

  def activations(self, *, O: int, U: int, M: int, C: int, E: int, D: int, F: int) -> Iterator[dict[str, int]]:
    yield {"experts": E, "expert_embed": D, "expert_mlp": F}
    yield {"outer": O, "groups": U, "group_tokens": M, "expert_mlp": F}  # within the computation of one device


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseDispatch(Dispatch, kind="dense"):
  """Applies every expert to every token, which costs num_experts / experts_per_token times as many FLOPs. DS-MoE is
  trained in this way (arXiv 2404.05567)."""

  def activations(self, *, O: int, U: int, M: int, C: int, E: int, D: int, F: int) -> Iterator[dict[str, int]]:
    yield {"outer": O, "groups": U, "group_tokens": M, "expert_mlp": F}
