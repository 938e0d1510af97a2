"""The training step, a pure function that is jitted once and donates its state.

B batch  T query position  Z = parts of a batch in gradient accumulation
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax.config.model import Model
from moejax.host_memory import to_device, to_host
from moejax.models.abstract import Parameters
from moejax.training.anomalies import is_accepted, keep_unless, with_loss
from moejax.training.bias_update import update_bias
from moejax.training.loss import Batch, LossSums, Metrics, denominators, loss_sums, objective, router_sums
from moejax.training.state import State, TrainSpec

TrainStep = Callable[[State, Batch, jax.Array | np.float32], tuple[State, Metrics]]
"""Maps (state, batch, learning_rate) to (state, metrics)."""

BATCH_TYPES = {
  "tokens": jnp.int32,
  "targets": jnp.int32,
  "segments": jnp.int32,
  "positions": jnp.int32,
  "weights": jnp.float32,
}


def make_train_step(spec: TrainSpec) -> jax.stages.Wrapped:
  """Returns the jitted training step of an experiment, with its shardings. It reuses the memory of the old state."""

  anomalies = spec.experiment.training.anomalies

  def train_step(state: State, batch: Batch, learning_rate: jax.Array) -> tuple[State, Metrics]:
    key = _noise_key(spec, state.step)
    gradients, metrics = _gradients(spec, state.parameters, batch, key)
    with jax.named_scope("optimizer"):
      grad_norm = optax.tree.norm(gradients)
      moments = to_device(state.optimizer, after=grad_norm)
      # Multiply by a factor. The clipping of optax selects between two arrays, which needs a copy of every gradient.
      clip = jnp.minimum(1.0, spec.experiment.optimizer.gradient_clip / (grad_norm + 1e-30))
      gradients = jax.tree.map(lambda gradient: gradient * clip, gradients)
      updates, optimizer = spec.optimizer.update(gradients, moments, state.parameters, learning_rate=learning_rate)
      updates = jax.tree.map(lambda update: -learning_rate * update, updates)
      parameters = optax.apply_updates(state.parameters, updates)
      if rate := _bias_rate(spec.experiment.model):
        parameters = update_bias(parameters, metrics["router/choices"], rate)
      accepted = is_accepted(anomalies, moments, metrics["loss"], grad_norm)
      optimizer = with_loss(anomalies, optimizer, metrics["loss"])
      old = (state.parameters, moments)
      parameters, optimizer = keep_unless(accepted, (parameters, optimizer), old)
      optimizer = to_host(optimizer, spec.shardings.optimizer)
      metrics |= {
        "skipped": 1.0 - accepted,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(parameters),
        "learning_rate": learning_rate,
        "target_tokens": jnp.sum(batch["weights"] > 0),
        "fill_rate": jnp.mean((batch["segments"] > 0).astype(jnp.float32)),
      }
    return State(state.step + 1, parameters, optimizer), metrics

  placement = spec.partitioner
  batch_placement = dict.fromkeys(BATCH_TYPES, placement.batch)
  return jax.jit(
    train_step,
    in_shardings=(spec.shardings, batch_placement, placement.replicated),
    out_shardings=(spec.shardings, placement.replicated),
    donate_argnums=0,
  )


def abstract_inputs(spec: TrainSpec) -> tuple[Any, Any, Any]:
  """The arguments of the step as shapes with shardings, to compile it without data."""
  experiment, placement = spec.experiment, spec.partitioner
  shape = (experiment.training.batch_size, experiment.data.sequence_length)
  batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=placement.batch) for name, dtype in BATCH_TYPES.items()}
  return spec.abstract_state, batch, jax.ShapeDtypeStruct((), jnp.float32, sharding=placement.replicated)


def _bias_rate(model: Model) -> float:
  """The bias update rate of the routers, 0 if they have no bias."""
  return model.moe.router.bias_rate if model.moe else 0.0


def _noise_key(spec: TrainSpec, step: jax.Array) -> jax.Array | None:
  """The random key of a step for the noise of routers, which does not depend on the mesh. None without noise."""
  moe = spec.experiment.model.moe
  if moe is None or not moe.router.is_noisy:
    return None
  return jax.random.fold_in(jax.random.key(spec.experiment.training.seed + 1), step)


def _gradients(
  spec: TrainSpec, parameters: Parameters, batch: Batch, key: jax.Array | None = None
) -> tuple[Parameters, Metrics]:
  """Gradients and metrics of the batch, which do not depend on the number of microbatches."""
  model, training = spec.experiment.model, spec.experiment.training
  by = denominators(batch, model)
  keys_B = None if key is None else jax.random.split(key, training.batch_size)

  def loss(
    parameters: Parameters, of_whole: LossSums, rows: Batch, keys_B: jax.Array | None
  ) -> tuple[jax.Array, LossSums]:
    sums = loss_sums(spec.model.module(parameters), rows, keys_B)
    return objective(_within(of_whole, sums), by, model, training.losses)[0], sums

  gradient = jax.grad(loss, has_aux=True)
  if training.gradient_accumulation == 1:
    gradients, sums = gradient(parameters, (), batch, keys_B)
  else:
    parts = _parts(spec, batch, keys_B)
    of_whole: LossSums = ()
    if training.losses.of_whole_batch:
      of_whole = _sum_over(parts, lambda *part: router_sums(spec.model.module(parameters), *part)[1])
    gradients, sums = _sum_over(parts, lambda *part: gradient(parameters, of_whole, *part))
  return gradients, objective(sums, by, model, training.losses)[1]


Parts = tuple[Batch, jax.Array | None]
"""Rows and their random keys, with a leading dimension of microbatches."""


def _parts(spec: TrainSpec, batch: Batch, keys_B: jax.Array | None) -> Parts:
  parts = spec.experiment.training.gradient_accumulation

  def split(x_BT: jax.Array) -> jax.Array:
    x_ZBT = x_BT.reshape(parts, -1, *x_BT.shape[1:])
    return spec.partitioner.constrain(x_ZBT, None, "batch", "sequence")

  return {name: split(x_BT) for name, x_BT in batch.items()}, None if keys_B is None else keys_B.reshape(parts, -1)


def _sum_over(parts: Parts, function: Callable[..., Any]) -> Any:
  """Applies the function to each microbatch in turn and returns the sum of the results."""

  def add(total: Any, part: Parts) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, function(*part)), None

  shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  return jax.lax.scan(add, zeros, parts)[0]


def _within(of_whole: LossSums, of_part: LossSums) -> LossSums:
  """The sums of a microbatch, with the values of the whole batch where they are known. The gradient of a loss that is
  not a sum over tokens is then taken at the sums of the whole batch."""

  def value_of(whole: jax.Array, part: jax.Array) -> jax.Array:
    return whole + (part - jax.lax.stop_gradient(part))

  return tuple(
    part | {kind: jax.tree.map(value_of, sums, part[kind]) for kind, sums in whole.items()}
    for whole, part in zip(of_whole or ({},) * len(of_part), of_part, strict=True)
  )
