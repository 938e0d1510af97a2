"""The function of each router, from logits to choices.

O outer batch  U routing groups  M tokens  E experts
"""

from collections.abc import Callable
from typing import Any

import jax

from moejax.config.router import DenseRouter, ExpertChoiceRouter, Router, TopKRouter, TopPRouter
from moejax.errors import UserError
from moejax.models.moe.routers.dense import dense
from moejax.models.moe.routers.expert_choice import expert_choice
from moejax.models.moe.routers.top_k import top_k
from moejax.models.moe.routers.top_p import top_p
from moejax.models.moe.routing import RouterContext, Routing

Route = Callable[[Any, jax.Array, RouterContext], Routing]
"""(configuration of the router, logits_OUME, context) to the choices of every token, float32. It is called on the
tokens of all devices."""

ROUTERS: dict[type[Router], Route] = {
  TopKRouter: top_k,
  TopPRouter: top_p,
  ExpertChoiceRouter: expert_choice,
  DenseRouter: dense,
}
"""By class of the configuration. A user's own file may add to it."""


def route(router: Router, logits_OUME: jax.Array, context: RouterContext) -> Routing:
  """The choices of every token.

  Raises:
    UserError: ROUTERS has no function for the router, or the function does what a fact of the router denies.
  """
  function, name = ROUTERS.get(type(router)), type(router).__name__
  if function is None:
    raise UserError(f"router {name} has no function; add one, as in moejax.models.moe.router.ROUTERS[{name}]")
  routing = function(router, logits_OUME, context)
  if routing.every_expert != router.every_expert:
    raise UserError(
      f"router {name} has every_expert={router.every_expert}, but its routing has every_expert={routing.every_expert}; "
      "make them equal"
    )
  return routing
