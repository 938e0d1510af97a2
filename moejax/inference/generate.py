"""Generates continuations: prefill of a batch, then one compiled step per token until all stop conditions are met.

B batch  T query position  D embed
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax.inference.buckets import batches_by_length, bucket
from moejax.inference.cache import Cache, cache_shardings, empty_cache, extend, row_sharding
from moejax.inference.dropless import check_batch_size
from moejax.inference.sampling import GREEDY, Sampling, sample
from moejax.models.abstract import AbstractModel, Parameters
from moejax.models.transformer import Transformer
from moejax.partitioning import to_devices

Stop = Callable[[list[int]], bool]
"""Returns whether a continuation is complete; called after each of its tokens."""


class Generator:
  """Programs that continue prompts. They are compiled once for each bucket of lengths and take any parameters."""

  def __init__(self, model: AbstractModel, batch_size: int, vocab_size: int, sampling: Sampling = GREEDY):
    self._model, self._batch_size = model, batch_size
    check_batch_size(model, batch_size)
    choose = functools.partial(sample, sampling=sampling, vocab_size=vocab_size)
    rows, cache = row_sharding(model, batch_size), cache_shardings(model, batch_size)
    self._rows = rows
    everywhere = model.partitioner.replicated

    def prefill(
      parameters: Parameters, tokens_BT: jax.Array, counts_B: jax.Array, key: jax.Array, slots: int
    ) -> tuple[jax.Array, Cache]:
      transformer = model.module(parameters)
      x_BTD, cache = extend(transformer, tokens_BT, counts_B, empty_cache(model, batch_size, slots))
      last_BD = jnp.take_along_axis(x_BTD, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)[:, 0]
      return choose(_logits(transformer, last_BD), key), cache

    def decode(
      parameters: Parameters, cache: Cache, token_B: jax.Array, active_B: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Cache]:
      transformer = model.module(parameters)
      x_BTD, cache = extend(transformer, token_B[:, None], active_B, cache)
      return choose(_logits(transformer, x_BTD[:, 0]), key), cache

    self._prefill = jax.jit(
      prefill,
      static_argnums=4,
      in_shardings=(model.shardings, model.partitioner.batch, rows, everywhere),
      out_shardings=(everywhere, cache),
    )
    self._decode = jax.jit(
      decode,
      in_shardings=(model.shardings, cache, rows, rows, everywhere),
      out_shardings=(everywhere, cache),
      donate_argnums=1,
    )

  def generate(
    self, parameters: Parameters, prompts: Sequence[Sequence[int]], stops: Sequence[Stop], max_new: int, seed: int = 0
  ) -> Iterator[tuple[int, list[int]]]:
    """Yields (index of a prompt, its continuation) as batches are done. Prompts of similar length share a batch.

    Args:
      parameters: of the model.
      prompts: token ids, at least one each.
      stops: the stop condition of each prompt. The token that meets it is part of the continuation.
      max_new: maximum number of new tokens.
      seed: seed of the sampling.
    """
    for number, indices in enumerate(batches_by_length([len(prompt) for prompt in prompts], self._batch_size)):
      key = jax.random.fold_in(jax.random.key(seed), number)
      batch = [prompts[i] for i in indices]
      yield from zip(indices, self._batch(parameters, batch, [stops[i] for i in indices], max_new, key), strict=True)

  def _batch(
    self, parameters: Parameters, prompts: list[Sequence[int]], stops: list[Stop], max_new: int, key: jax.Array
  ) -> list[list[int]]:
    counts_B = np.zeros(self._batch_size, np.int32)
    counts_B[: len(prompts)] = [len(prompt) for prompt in prompts]
    tokens_BT = np.zeros((self._batch_size, bucket(int(counts_B.max()))), np.int32)
    for row, prompt in enumerate(prompts):
      tokens_BT[row, : len(prompt)] = prompt
    put = functools.partial(to_devices)
    slots = bucket(tokens_BT.shape[1] + max_new)
    continuations: list[list[int]] = [[] for _ in prompts]
    active_B = (counts_B > 0).astype(np.int32)
    token_B, cache = self._prefill(
      parameters, put(tokens_BT, self._model.partitioner.batch), put(counts_B, self._rows), key, slots
    )
    for step in range(1, max_new + 1):
      for row, token in enumerate(np.asarray(token_B)[: len(prompts)].tolist()):
        if active_B[row]:
          continuations[row].append(token)
          active_B[row] = not stops[row](continuations[row])
      if step == max_new or not active_B.any():
        break
      token_B, cache = self._decode(
        parameters, cache, put(np.asarray(token_B), self._rows), put(active_B, self._rows),
        jax.random.fold_in(key, step),
      )  # fmt: skip
    return continuations


def _logits(transformer: Transformer, x_BD: jax.Array) -> jax.Array:
  return transformer.partitioner.constrain(transformer.logits(x_BD), "batch", "vocab")
