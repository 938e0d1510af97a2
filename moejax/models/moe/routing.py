"""What a router is told, and what it decides, in the one form that every dispatch reads.

O outer batch  U routing groups  M tokens  E experts  A experts per token  B batch
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.config.moe import MoE
from moejax.partitioning import Partitioner

TOKENS = ("outer", "groups", "group_tokens", None)
"""Names of [O, U, M, anything]: a device routes its own tokens."""


class RouterContext(NamedTuple):
  """What a router may need beside the logits."""

  moe: MoE
  """The sparse layer, with its limits."""
  valid_OUM: jax.Array
  """False for padding, which chooses nothing and is chosen by nothing."""
  partitioner: Partitioner
  """Says which tokens a device holds."""
  bias_E: jax.Array | None = None
  """Added to the scores that decide who is chosen, and not to the weights."""
  keys_B: jax.Array | None = None
  """Random keys of the sequences, for noise in training. None: no noise."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """A router's decision: for every token a list of A choices, some of which may be void."""

  experts_OUMA: jax.Array
  """The chosen experts, best first, int32; a token chooses an expert at most once."""
  weights_OUMA: jax.Array
  """Weight of each choice in the token's output, float32; 0 where void."""
  chosen_OUMA: jax.Array
  """Whether the choice counts, bool: False for padded tokens and for places that the router left empty."""
  every_expert: bool = dataclasses.field(default=False, metadata={"static": True})
  """Whether A is E and choice a is expert a, as routers have it that leave the number of choices open."""

  def chosen_OUME(self, num_experts: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """1 where a token chose an expert, else 0."""
    return self._by_expert(self.chosen_OUMA.astype(dtype), num_experts)

  def weights_OUME(self, num_experts: int) -> jax.Array:
    """Weight of every expert for every token, float32; 0 for those that it did not choose."""
    return self._by_expert(self.weights_OUMA, num_experts)

  def _by_expert(self, x_OUMA: jax.Array, num_experts: int) -> jax.Array:
    if self.every_expert:
      return x_OUMA
    # A comparison and a sum over A, which fuse: no scatter, forwards or backwards.
    is_expert_OUMAE = self.experts_OUMA[..., None] == jnp.arange(num_experts).reshape(1, 1, 1, 1, -1)
    return jnp.sum(jnp.where(is_expert_OUMAE, x_OUMA[..., None], jnp.zeros((), x_OUMA.dtype)), axis=-2)
