"""Computes log-likelihoods of continuations, in batches of similar length.

B batch  T query position  W scored position  D embed
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax import processes
from moejax.inference.buckets import batches_by_length, bucket
from moejax.inference.dropless import check_batch_size
from moejax.models.abstract import AbstractModel, Parameters
from moejax.partitioning import to_devices


@dataclasses.dataclass(frozen=True)
class Window:
  """Consecutive tokens, of which the last `scored` are predicted from the tokens before them."""

  tokens: list[int]
  scored: int


def windows(context: Sequence[int], continuation: Sequence[int], max_length: int) -> list[Window]:
  """Windows of at most max_length + 1 tokens that predict each token of the continuation once.

  If the continuation fits, there is one window, whose context is truncated on the left. Otherwise there are the rolling
  windows of lm-evaluation-harness: the first has one token of context, and the last as many as fit.
  """
  ids = [*context, *continuation]
  if len(continuation) <= max_length:
    return [Window(ids[-(max_length + 1) :], len(continuation))] if continuation else []
  ends = [*range(len(context) + max_length, len(ids), max_length), len(ids)]
  starts = [len(context), *ends[:-1]]
  return [Window(ids[end - max_length - 1 : end], end - start) for start, end in zip(starts, ends, strict=True)]


class Scorer:
  """Programs that score windows. They are compiled once for each bucket of lengths and take any parameters."""

  def __init__(self, model: AbstractModel, batch_size: int, max_length: int):
    self._model, self._batch_size, self._max_length = model, batch_size, max_length
    placement = model.partitioner
    check_batch_size(model, batch_size)

    def score(
      parameters: Parameters, tokens_BT: jax.Array, scored_BW: jax.Array, targets_BW: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
      """Returns the summed log-likelihood of each row, and whether all its targets have the largest logit. scored_BW is
      -1 for padding."""
      transformer = model.module(parameters)
      # Padding comes after the tokens, so that no token attends to it.
      positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
      x_BTD, _ = transformer(tokens_BT, jnp.ones_like(tokens_BT), positions_BT)
      x_BWD = jnp.take_along_axis(x_BTD, jnp.maximum(scored_BW, 0)[:, :, None], axis=1)
      scores, real_BW = transformer.score(x_BWD, targets_BW), scored_BW >= 0
      return (
        jnp.sum(jnp.where(real_BW, -scores.loss_BT, 0.0), axis=-1),
        jnp.all(scores.is_best_BT | ~real_BW, axis=-1),
      )

    self._score = jax.jit(
      score,
      in_shardings=(model.shardings, placement.batch, placement.batch, placement.batch),
      out_shardings=(placement.replicated, placement.replicated),
    )
    self._programs: dict[tuple[int, int], jax.stages.Compiled] = {}
    """By length of the tokens and number of scored targets."""

  def score(
    self, parameters: Parameters, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
  ) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Yields (index of a pair, (log-likelihood in nats, whether greedy decoding gives it)) when batches are done.

    Args:
      parameters: parameters of the model.
      pairs: a context of at least one token, and a continuation. An empty continuation has log-likelihood 0.
    """
    of_pair = [windows(context, continuation, self._max_length) for context, continuation in pairs]
    left = [len(parts) for parts in of_pair]
    totals = [(0.0, True) for _ in pairs]
    yield from ((i, totals[i]) for i, count in enumerate(left) if not count)
    flat = [(i, window) for i, parts in enumerate(of_pair) for window in parts]
    for batch in batches_by_length([len(window.tokens) for _, window in flat], self._batch_size):
      sums, greedy = self._batch(parameters, [flat[j][1] for j in batch])
      for row, (i, _) in enumerate(flat[j] for j in batch):
        totals[i] = (totals[i][0] + float(sums[row]), totals[i][1] and bool(greedy[row]))
        left[i] -= 1
        if not left[i]:
          yield i, totals[i]

  def _batch(self, parameters: Parameters, rows: list[Window]) -> tuple[np.ndarray, np.ndarray]:
    length = bucket(max(len(row.tokens) for row in rows) - 1)
    scored = bucket(max(row.scored for row in rows))
    tokens_BT = np.zeros((self._batch_size, length), np.int32)
    scored_BW = np.full((self._batch_size, scored), -1, np.int32)
    targets_BW = np.zeros((self._batch_size, scored), np.int32)
    for i, row in enumerate(rows):
      last = len(row.tokens) - 1
      tokens_BT[i, :last] = row.tokens[:-1]
      scored_BW[i, : row.scored] = np.arange(last - row.scored, last)
      targets_BW[i, : row.scored] = row.tokens[-row.scored :]
    batch = to_devices((tokens_BT, scored_BW, targets_BW), self._model.partitioner.batch)
    if (length, scored) not in self._programs:
      self._programs[length, scored] = self._score.lower(parameters, *batch).compile()
      processes.wait_for_all()
    return jax.device_get(self._programs[length, scored](parameters, *batch))
