"""The functions of routers, which map logits to choices.

O outer batch  U routing groups  M tokens  E experts  A experts per token
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config.kinds import described, function_of, running
from moejax.config.router import DenseRouter, ExpertChoiceRouter, Router, ThresholdRouter, TopKRouter, TopPRouter
from moejax.errors import UserError
from moejax.models.moe.routers.dense import dense
from moejax.models.moe.routers.expert_choice import expert_choice
from moejax.models.moe.routers.threshold import threshold
from moejax.models.moe.routers.top_k import top_k
from moejax.models.moe.routers.top_p import top_p
from moejax.models.moe.routing import RouterContext, Routing
from moejax.models.returned import check_returned, shown

Route = Callable[[Any, jax.Array, RouterContext], Routing]
"""Maps (configuration of the router, logits_OUME, context) to the choices of every token, float32. It is called on the
tokens of all devices."""

ROUTERS: dict[type[Router], Route] = {
  TopKRouter: top_k,
  TopPRouter: top_p,
  ExpertChoiceRouter: expert_choice,
  DenseRouter: dense,
  ThresholdRouter: threshold,
}
"""Routers by class of the configuration. Custom routers are added to it."""


def route(router: Router, logits_OUME: jax.Array, context: RouterContext) -> Routing:
  """Returns the choices of every token.

  Raises:
    UserError: If ROUTERS has no function for the router, or it returns something other than the router describes.
  """
  function = function_of(router, ROUTERS)
  with running(router):
    routing = function(router, logits_OUME, context)
  _check(router, routing, logits_OUME.shape, context.moe.experts_per_token)
  return routing


def _check(router: Router, routing: Routing, shape_OUME: tuple[int, ...], most: int) -> None:
  """Raises UserError if a routing does not have the form that dispatches expect."""
  name = described(type(router))
  if not isinstance(routing, Routing):
    raise UserError(f"{name} returned {shown(routing)}, not a moejax.models.moe.routing.Routing")
  if routing.every_expert != router.every_expert:
    raise UserError(
      f"{name} has every_expert={router.every_expert}, but its routing has every_expert={routing.every_expert}; "
      "make them equal"
    )
  *tokens, E = shape_OUME
  listed = next(reversed(getattr(routing.experts_OUMA, "shape", ())), 0)
  A = E if router.every_expert else listed if 0 < listed <= most else most
  for field, dtype in (("experts_OUMA", jnp.int32), ("weights_OUMA", jnp.float32), ("chosen_OUMA", jnp.bool_)):
    check_returned(router, field, getattr(routing, field), (*tokens, A), dtype)
