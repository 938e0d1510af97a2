"""Samples the next token from logits.

B batch  V vocab
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moejax.errors import UserError

COLDEST, HOTTEST = 1e-30, 1e30
"""Smallest temperature above 0 and the largest, by which logits can be divided in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """Sampling from softmax(logits / temperature), limited to the most probable tokens. Temperature 0 is greedy."""

  temperature: float = 0.0
  top_k: int | None = None
  """Number of most probable tokens to sample from. None means all."""
  top_p: float | None = None
  """Sample from the smallest set of most probable tokens with at least this total probability (arXiv 1904.09751)."""
  min_p: float | None = None
  """Sample from tokens with at least this fraction of the probability of the best one (arXiv 2407.01082)."""

  def __post_init__(self) -> None:
    if self.temperature != 0 and not COLDEST <= self.temperature <= HOTTEST:
      raise UserError(
        f"temperature={self.temperature} must be 0, for greedy decoding, or between {COLDEST} and {HOTTEST}"
      )
    if self.top_k is not None and self.top_k < 1:
      raise UserError(f"top_k={self.top_k} must be 1 or above")
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")
    if self.min_p is not None and not 0 <= self.min_p <= 1:
      raise UserError(f"min_p={self.min_p} must be 0 or above and at most 1")
    for name in ("top_k", "top_p", "min_p"):
      if self.temperature == 0 and getattr(self, name) is not None:
        raise UserError(
          f"{name}={getattr(self, name)} has no effect with temperature=0 (greedy decoding); set temperature above 0, "
          "such as 1"
        )


GREEDY = Sampling()


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling, vocab_size: int) -> jax.Array:
  """Returns token_B in int32.

  Args:
    logits_BV: float32.
    keys_B: random key of each row, which greedy sampling ignores.
    sampling: temperature and limits.
    vocab_size: vocabulary size of the tokenizer. Larger ids, which the model may have, are never drawn.
  """
  ids_1V = jnp.arange(logits_BV.shape[-1])[None]
  logits_BV = jnp.where(ids_1V < vocab_size, logits_BV, -jnp.inf)
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV / sampling.temperature
  descending_BV = -jnp.sort(-logits_BV, axis=-1)
  if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
    logits_BV = jnp.where(logits_BV < descending_BV[:, sampling.top_k - 1, None], -jnp.inf, logits_BV)
  if sampling.top_p is not None and sampling.top_p < 1:  # the sum of all can be rounded to 1 before the last token
    probs_BV = jax.nn.softmax(-jnp.sort(-logits_BV, axis=-1), axis=-1)  # after top_k
    # Tokens before the one at which the sum reaches top_p, and that one.
    kept_B1 = jnp.sum(jnp.cumsum(probs_BV, axis=-1) - probs_BV < sampling.top_p, axis=-1, keepdims=True)
    least_B1 = jnp.take_along_axis(descending_BV, kept_B1 - 1, axis=-1)
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if sampling.min_p:
    least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + math.log(sampling.min_p)
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
