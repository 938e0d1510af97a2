"""Trains each sparse layer alone to compute what the dense layer does that it replaces (LaDiMo, arXiv 2408.04278).

The experts start as slices of the dense layer. The loss is the mean squared difference of the outputs for a calibration
text, relative to the mean square of the dense layer's output, and the load-balancing loss. The paper leaves open how
experts start, their number and the load-balancing loss.

B batch  T query position  D embed
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moejax.config.model import Model
from moejax.inference.dropless import inference_model
from moejax.interop.layer_inputs import Batch, LayerInputs, layer_inputs
from moejax.models.abstract import AbstractModel, Parameters
from moejax.models.moe.router_counts import sum_counts, token_counts
from moejax.models.moe.router_metrics import auxiliary_losses
from moejax.progress import SILENT, Progress

LEARNING_RATE = 1e-3
EPOCHS = 30
"""Number of passes over the calibration text for each layer."""

Layer = dict[str, Any]
"""The parameters of a sparse layer."""


def distill(
  dense: AbstractModel,
  parameters: Parameters,
  sparse: Model,
  starts: Sequence[Layer],
  batches: Sequence[Batch],
  load_balance: float,
  progress: Progress = SILENT,
) -> list[Layer]:
  """Returns the trained sparse layers, from the first to the last. Stacks of layers in `parameters` are deleted.

  Args:
    dense: the dense model, for inference.
    parameters: its parameters.
    sparse: the sparse model.
    starts: the parameters of each sparse layer at the start.
    batches: the calibration text.
    load_balance: coefficient of the load-balancing loss.
    progress: receives progress reports, and the error of each layer before and after.
  """
  assert sparse.moe
  every = sparse.moe.every
  unrolled = inference_model(dataclasses.replace(sparse, layers="unrolled"), dense.partitioner)
  layers: Any = unrolled.module(unrolled.parameters).layers
  graph = nnx.split(layers[0].blocks[every - 1].feed_forward)[0]
  trained: list[Layer] = []
  progress.stage("distill layers", total=dense.config.num_layers)
  for number, layer in enumerate(layer_inputs(dense, parameters, batches), 1):
    if number % every == 0:
      start = starts[len(trained)]
      found = _fit(graph, start, layer, load_balance)
      before, after = (_error(graph, each, layer) for each in (start, found))
      progress.note(f"layer {number}: relative squared error {before:.3f} before, {after:.3f} after distillation")
      trained.append(found)
    progress.advance(number)
  return trained


def _fit(graph: nnx.GraphDef, start: Layer, layer: LayerInputs, load_balance: float) -> Layer:
  target_graph, target = nnx.split(layer.feed_forward)
  parameters = jax.tree.map(jnp.copy, start)
  moments = _optimizer(EPOCHS * len(layer.inputs)).init(parameters)
  for _ in range(EPOCHS):
    for x_BTD, valid_BT in zip(layer.inputs, layer.valid, strict=True):
      parameters, moments = _step(
        graph, target_graph, EPOCHS * len(layer.inputs), load_balance, parameters, moments, target, x_BTD, valid_BT
      )
  return parameters


def _optimizer(steps: int) -> optax.GradientTransformation:
  return optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(4, 5))
def _step(
  graph: nnx.GraphDef,
  target_graph: nnx.GraphDef,
  steps: int,
  load_balance: float,
  parameters: Layer,
  moments: optax.OptState,
  target: nnx.State,
  x_BTD: jax.Array,
  valid_BT: jax.Array,
) -> tuple[Layer, optax.OptState]:
  wanted_BTD = nnx.merge(target_graph, target)(x_BTD)

  def loss(parameters: Layer) -> jax.Array:
    error, balance = _losses(graph, parameters, wanted_BTD, x_BTD, valid_BT)
    return error + load_balance * balance

  updates, moments = _optimizer(steps).update(jax.grad(loss)(parameters), moments)
  return optax.apply_updates(parameters, updates), moments


def _losses(
  graph: nnx.GraphDef, parameters: Layer, wanted_BTD: jax.Array, x_BTD: jax.Array, valid_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The relative squared error, and the load-balancing loss."""
  layer = nnx.merge(graph, parameters)
  out_BTD, counts = layer(x_BTD, valid_BT)
  valid_BT1 = valid_BT[..., None]
  error = jnp.sum(jnp.where(valid_BT1, jnp.square((out_BTD - wanted_BTD).astype(jnp.float32)), 0.0))
  error /= jnp.sum(jnp.where(valid_BT1, jnp.square(wanted_BTD.astype(jnp.float32)), 0.0))
  T = x_BTD.shape[1]
  sums = sum_counts(jax.tree.map(lambda of_layer: of_layer[None], counts), 1, T)
  losses = auxiliary_losses(sums, token_counts(valid_BT, 1), ("global_balance",))
  return error, losses["global_balance"][0]


def _error(graph: nnx.GraphDef, parameters: Layer, layer: LayerInputs) -> float:
  """Mean relative squared error over the calibration batches."""
  target_graph, target = nnx.split(layer.feed_forward)
  pairs = zip(layer.inputs, layer.valid, strict=True)
  errors = [float(_measured(graph, target_graph, parameters, target, x, valid)) for x, valid in pairs]
  return sum(errors) / len(errors)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measured(
  graph: nnx.GraphDef,
  target_graph: nnx.GraphDef,
  parameters: Layer,
  target: nnx.State,
  x_BTD: jax.Array,
  valid_BT: jax.Array,
) -> jax.Array:
  return _losses(graph, parameters, nnx.merge(target_graph, target)(x_BTD), x_BTD, valid_BT)[0]
