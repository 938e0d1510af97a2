"""Rematerialization: which values of a layer are saved for the backward pass, and which are recomputed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moejax.config.model import Model
from moejax.config.remat import values_of
from moejax.host_memory import HOST

LAYER_INPUTS = "layer_inputs"
"""Name of the inputs of layers, which are always saved, if they are offloaded."""

Policy = Callable[..., Any]
"""Decides which values `jax.checkpoint` saves, and where."""


def policy(model: Model) -> Policy:
  """The policy of `model.remat`, with the values of `model.offload_activations` saved in the memory of the host."""
  policies = jax.checkpoint_policies
  save = policies.save_only_these_names(*model.saved_values)
  if model.remat == "dots":
    save = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, save)
  if not model.offload_activations:
    return save
  offload = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=(),
    names_which_can_be_offloaded=values_of(model.offload_activations),
    offload_src="device",
    offload_dst=HOST,
  )

  def save_or_offload(primitive: Any, *shapes: Any, **parameters: Any) -> Any:
    found = offload(primitive, *shapes, **parameters)
    return found if isinstance(found, tuple) else save(primitive, *shapes, **parameters)  # a tuple offloads

  return save_or_offload


def layer_inputs(x: Any, model: Model) -> Any:
  """Marks the inputs of a layer to be saved in the memory of the host, if they are offloaded."""
  if LAYER_INPUTS not in model.offload_activations:
    return x
  return jax.tree.map(lambda x: checkpoint_name(x, LAYER_INPUTS), x)


def recomputed(module: nnx.Module, model: Model, call: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the function of x and more arguments that `call` is of a module and these, with the policy of
  `model.remat`.

  What `call` has from elsewhere, such as masks, is saved for the backward pass.
  """
  graph, parameters = nnx.split(module)

  def run(parameters: nnx.State, x: Any, *arguments: Any) -> Any:
    return call(nnx.merge(graph, parameters), layer_inputs(x, model), *arguments)

  if model.remat != "none":
    run = jax.checkpoint(run, policy=policy(model))
  return functools.partial(run, nnx.as_pure(parameters))


def keep(x: jax.Array, value: str) -> jax.Array:
  """Marks x to be saved for the backward pass where `model.remat` saves this value of `moejax.config.remat`."""
  return checkpoint_name(x, value)


def of_kept(products: Callable[..., Any], value: str) -> Callable[..., Any]:
  """Returns `products`, a function of x and more, whose backward pass reads x as saved by `keep`.

  Only the backward pass sees the saved copy. JAX rounds a saved value that others use too (`reduce_precision`), for
  which XLA for TPU makes a separate pass over it.
  """
  run = jax.custom_vjp(products)

  def forwards(x: jax.Array, *more: Any) -> tuple[Any, tuple[Any, ...]]:
    return products(x, *more), (keep(x, value), *more)

  def backwards(kept: tuple[Any, ...], into: Any) -> tuple[Any, ...]:
    return jax.vjp(products, *kept)[1](into)

  run.defvjp(forwards, backwards)
  return run
