"""Generates continuations: prefill of a batch in chunks, then one step per token until all stop conditions are met.

B batch  T query position  D embed
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.inference.buckets import batches_by_length, bucket
from moejax.inference.cache import Cache, cache_shardings, empty_cache, extend, row_sharding
from moejax.inference.dropless import check_batch_size
from moejax.inference.expert_views import round_experts, separate_experts
from moejax.inference.sampling import GREEDY, Sampling, sample
from moejax.models.abstract import AbstractModel, Parameters
from moejax.models.moe.experts import FEW
from moejax.models.transformer import Transformer
from moejax.partitioning import to_devices

Stop = Callable[[list[int]], bool]
"""Returns whether a continuation is complete. It is called after each token."""


CHUNK = 512
"""Number of prompt tokens that are computed at once, which limits the memory for activations."""

Observe = Callable[[int, list[int]], None]
"""Called after each token with the index of a prompt and its continuation so far."""


def _unobserved(index: int, continuation: list[int]) -> None:
  pass


class Generator:
  """Compiled programs that generate text with any parameters of a model.

  There is one program per length of a chunk and of the cache. These lengths are rounded up to a few values, so that
  programs are not compiled for each prompt length.
  """

  def __init__(self, model: AbstractModel, batch_size: int, vocab_size: int, sampling: Sampling = GREEDY):
    self._model, self._batch_size = model, batch_size
    check_batch_size(model, batch_size)
    choose = functools.partial(sample, sampling=sampling, vocab_size=vocab_size)
    rows, cache = row_sharding(model, batch_size), cache_shardings(model, batch_size)
    batch, everywhere = model.partitioner.batch, model.partitioner.replicated
    self._rows, self._everywhere = rows, everywhere

    def prefill(
      parameters: Parameters,
      cache: Cache,
      tokens_BT: jax.Array,
      counts_B: jax.Array,
      last_B: jax.Array,
      keys_B: jax.Array,
    ) -> tuple[jax.Array, Cache]:
      """Returns the next token of each row. A row without new tokens keeps its last token."""
      transformer = model.module(parameters)
      x_BTD, cache = extend(transformer, tokens_BT, counts_B, cache)
      x_BD = jnp.take_along_axis(x_BTD, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)[:, 0]
      return jnp.where(counts_B > 0, choose(_logits(transformer, x_BD), keys_B), last_B), cache

    def decode(
      parameters: Parameters, cache: Cache, last_B: jax.Array, active_B: jax.Array, keys_B: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Cache]:
      """Returns the token after `last_B` of each active row. The others keep their last token."""
      return prefill(parameters, cache, last_B[:, None], active_B, last_B, _folded(keys_B, step))

    self._empty = jax.jit(functools.partial(empty_cache, model, batch_size), static_argnums=0, out_shardings=cache)
    program = functools.partial(jax.jit, out_shardings=(everywhere, cache), donate_argnums=1)
    self._prefill = program(prefill, in_shardings=(None, cache, batch, rows, everywhere, everywhere))
    self._decode = program(decode, in_shardings=(None, cache, everywhere, rows, everywhere, everywhere))
    self._prepared: tuple[Parameters, Parameters] = ({}, {})

  def generate(
    self,
    parameters: Parameters,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[Stop],
    max_new: int | Sequence[int],
    seed: int = 0,
    observe: Observe = _unobserved,
  ) -> Iterator[tuple[int, list[int]]]:
    """Yields (index of a prompt, its continuation) when batches are done. Prompts of similar length share a batch.

    Args:
      parameters: parameters of the model.
      prompts: token ids, at least one per prompt.
      stops: the stop condition of each prompt. The token that fulfills it is part of the continuation.
      max_new: maximum number of new tokens, for all prompts or for each.
      seed: seed for sampling. A sample depends on it and on the index of the prompt, not on other prompts or the mesh.
      observe: called after each token.
    """
    limits = [max_new] * len(prompts) if isinstance(max_new, int) else list(max_new)
    for indices in batches_by_length([len(prompt) for prompt in prompts], self._batch_size):
      of_rows = np.zeros(self._batch_size, np.uint32)
      of_rows[: len(indices)] = indices
      keys_B = _folded(jax.random.key(seed), of_rows)
      rows = [_Row(i, prompts[i], stops[i], limits[i], observe, []) for i in indices]
      yield from self._batch(parameters, rows, keys_B)

  def _batch(self, parameters: Parameters, rows: list["_Row"], keys_B: jax.Array) -> Iterator[tuple[int, list[int]]]:
    longest, most = max(len(row.prompt) for row in rows), max(row.limit for row in rows)
    chunks = _chunks(longest)
    cache = self._empty(bucket(sum(chunks) + most))
    token_B, begin = to_devices(np.zeros(self._batch_size, np.int32), self._everywhere), 0
    for length in chunks:
      tokens_BT = np.zeros((self._batch_size, length), np.int32)
      counts_B = np.zeros(self._batch_size, np.int32)
      for b, row in enumerate(rows):
        part = row.prompt[begin : begin + length]
        tokens_BT[b, : len(part)], counts_B[b] = part, len(part)
      chunk = (to_devices(tokens_BT, self._model.partitioner.batch), to_devices(counts_B, self._rows))
      token_B, cache = self._prefill(self._for(length, parameters), cache, *chunk, token_B, keys_B)
      begin += length
    active = np.arange(self._batch_size) < len(rows)
    # The tokens stay on the devices as the input of the next step. They are copied from them, to be seen, and nothing
    # is copied to them until a row ends.
    for step in range(1, most + 1):
      before = active.copy()
      for b, token in enumerate(np.asarray(token_B)):
        if active[b]:
          active[b] = rows[b].take(int(token))
      if not active.any():
        break
      if step == 1 or (active != before).any():
        active_B = to_devices(active.astype(np.int32), self._rows)
      token_B, cache = self._decode(self._for(1, parameters), cache, token_B, active_B, keys_B, np.int32(step))
    yield from ((row.index, row.continuation) for row in rows)

  def _for(self, length: int, parameters: Parameters) -> Parameters:
    """The parameters in the form that is fastest for `length` tokens of each row."""
    rounds = self._model.config.precision.experts != "compute"
    if length * self._batch_size > FEW and not rounds:
      return parameters
    if self._prepared[0] is not parameters:
      self._prepared = parameters, (round_experts if rounds else separate_experts)(self._model, parameters)
    return self._prepared[1]


@dataclasses.dataclass(frozen=True)
class _Row:
  """One prompt of a batch, and its continuation so far."""

  index: int
  prompt: Sequence[int]
  stop: Stop
  limit: int
  observe: Observe
  continuation: list[int]

  def take(self, token: int) -> bool:
    """Adds a token. Returns whether the continuation is not complete yet."""
    self.continuation.append(token)
    self.observe(self.index, self.continuation)
    return len(self.continuation) < self.limit and not self.stop(self.continuation)


def _chunks(longest: int) -> list[int]:
  """Lengths of the chunks of the longest prompt of a batch."""
  whole, rest = divmod(longest, CHUNK)
  return [CHUNK] * whole + ([bucket(rest)] if rest else [])


def _folded(keys: jax.Array, numbers: Any) -> jax.Array:
  """A key for each of several keys or numbers."""
  return jax.vmap(jax.random.fold_in, (0 if keys.ndim else None, 0 if np.ndim(numbers) else None))(keys, numbers)


def _logits(transformer: Transformer, x_BD: jax.Array) -> jax.Array:
  return transformer.partitioner.constrain(transformer.logits(x_BD), "batch", "vocab")
