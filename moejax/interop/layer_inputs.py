"""The inputs of each feed-forward layer for a calibration text, layer by layer, for what changes one layer at a time.

B batch  T query position  D embed  V vocab
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.config.experiment import Experiment
from moejax.data.corpus import Corpus
from moejax.data.mixture import training_mixture
from moejax.data.pipeline import batches_by_step
from moejax.inference.unrolled import unroll
from moejax.models.abstract import AbstractModel, Parameters
from moejax.models.attend import context_of
from moejax.partitioning import to_devices

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class LayerInputs:
  """One feed-forward layer, and its inputs for the calibration text."""

  period: int
  block: int
  """The layer is block `block` of period `period`."""
  feed_forward: Any
  """The module of the feed-forward layer."""
  inputs: list[jax.Array]
  """The normalized input x_BTD of each batch."""
  valid: list[jax.Array]
  """False for padding, [B, T] of each batch."""


def calibration_batches(corpus: Corpus, experiment: Experiment, tokens: int) -> list[Batch]:
  """Random batches of the training text of a corpus with at least `tokens` tokens, padding included."""
  size, length = experiment.evaluation.batch_size, experiment.data.sequence_length
  batches = batches_by_step(training_mixture(corpus, experiment.data), experiment.data, size)
  names = ("tokens", "segments", "positions")
  return [{name: batches[step][name] for name in names} for step in range(-(-tokens // (size * length)))]


def layer_inputs(model: AbstractModel, parameters: Parameters, batches: Sequence[Batch]) -> Iterator[LayerInputs]:
  """Yields the feed-forward layers from the first to the last. Every layer has the inputs of the unchanged model.

  Stacks of layers in `parameters` are deleted.
  """
  model, parameters = unroll(model, parameters)
  transformer = model.module(parameters)
  placement = model.partitioner
  placed = [{name: to_devices(array, placement.batch) for name, array in batch.items()} for batch in batches]
  dtype = placement.compute_dtype(model.config)

  @jax.jit
  def embed(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    return table_VD.astype(dtype)[tokens_BT] * model.config.embedding_scale

  def attend(graph: nnx.GraphDef, state: nnx.State, x_BTD: jax.Array, batch: Batch) -> Any:
    context = context_of(model.config, jnp.asarray(batch["segments"]), jnp.asarray(batch["positions"]))
    return nnx.merge(graph, state).attend(x_BTD, context, None)[:2]

  def finish(graph: nnx.GraphDef, state: nnx.State, x_BTD: jax.Array, normed_BTD: jax.Array, batch: Batch) -> Any:
    block = nnx.merge(graph, state)
    return block.feed(x_BTD, normed_BTD, jnp.asarray(batch["segments"]) > 0, None)[0]

  attend, finish = jax.jit(attend, static_argnums=0), jax.jit(finish, static_argnums=0)
  xs = [embed(parameters["embedding_VD"], batch["tokens"]) for batch in placed]
  for block in transformer.leading:
    graph, state = nnx.split(block)
    pairs = [attend(graph, state, x_BTD, batch) for x_BTD, batch in zip(xs, placed, strict=True)]
    xs = [finish(graph, state, *pair, batch) for pair, batch in zip(pairs, placed, strict=True)]
  layers: Any = transformer.layers
  for p, period in enumerate(layers):
    for b, block in enumerate(period.blocks):
      graph, state = nnx.split(block)
      pairs = [attend(graph, state, x_BTD, batch) for x_BTD, batch in zip(xs, placed, strict=True)]
      normed = [normed_BTD for _, normed_BTD in pairs]
      yield LayerInputs(p, b, block.feed_forward, normed, [batch["segments"] > 0 for batch in placed])
      xs = [finish(graph, state, *pair, batch) for pair, batch in zip(pairs, placed, strict=True)]
