"""The input and the output of routers. Every dispatch reads the same `Routing`.

O outer batch  U routing groups  M tokens  E experts  A experts per token  B batch
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.config.moe import MoE
from moejax.partitioning import Partitioner

TOKENS = ("outer", "groups", "group_tokens", None)
"""Logical axes of [O, U, M, ...]: each device routes its own tokens."""


class RouterContext(NamedTuple):
  """Inputs of routers in addition to the logits."""

  moe: MoE
  """The sparse layer, with its limits."""
  valid_OUM: jax.Array
  """False for padding, which is never routed."""
  partitioner: Partitioner
  """Says which tokens a device holds."""
  bias_E: jax.Array | None = None
  """A bias that is added to the scores for the choice of experts, but not to the weights. None without one."""
  keys_B: jax.Array | None = None
  """Random keys of the sequences, for noise in training. None without noise."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """The decision of a router: A choices for every token, some of which may be void."""

  experts_OUMA: jax.Array
  """The chosen experts, best first, int32. A token chooses an expert at most once."""
  weights_OUMA: jax.Array
  """The weight of each choice in the output of the token, float32. 0 for a void choice."""
  chosen_OUMA: jax.Array
  """Whether the choice is valid, bool. False for padding, and for choices that the router leaves empty."""
  every_expert: bool = dataclasses.field(default=False, metadata={"static": True})
  """Whether A = E and choice a is expert a, as in routers with a variable number of choices per token."""

  def chosen_OUME(self, num_experts: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """1 where a token chose an expert, else 0."""
    return self._by_expert(self.chosen_OUMA.astype(dtype), num_experts)

  def weights_OUME(self, num_experts: int) -> jax.Array:
    """The weight of every expert for every token, float32. 0 for experts that the token did not choose."""
    return self._by_expert(self.weights_OUMA, num_experts)

  def _by_expert(self, x_OUMA: jax.Array, num_experts: int) -> jax.Array:
    if self.every_expert:
      return x_OUMA
    # A comparison and a sum over A fuse, and need no scatter in either pass.
    is_expert_OUMAE = self.experts_OUMA[..., None] == jnp.arange(num_experts).reshape(1, 1, 1, 1, -1)
    return jnp.sum(jnp.where(is_expert_OUMAE, x_OUMA[..., None], jnp.zeros((), x_OUMA.dtype)), axis=-2)
