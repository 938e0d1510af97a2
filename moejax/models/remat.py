"""Rematerialization: which values of a layer are saved for the backward pass, and which are recomputed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moejax.kernels.attention import ATTENTION

PRODUCTS = "products"
"""Name under which `keep` saves values for the backward pass. Attention saves its own as `ATTENTION`."""

_ATTENTION = jax.checkpoint_policies.save_only_these_names(ATTENTION)
_save = jax.checkpoint_policies.save_from_both_policies

POLICIES = {
  "products": jax.checkpoint_policies.save_only_these_names(ATTENTION, PRODUCTS),
  "dots": _save(jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION),
  "attention": _ATTENTION,
  "layer_inputs": jax.checkpoint_policies.nothing_saveable,
}
"""Policies of `jax.checkpoint` by the value of `model.remat`."""


def recomputed(module: nnx.Module, remat: str, call: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the function of more arguments that `call` is of a module and these, with the policy of `model.remat`.

  What `call` has from elsewhere, such as masks, is saved for the backward pass.
  """
  graph, parameters = nnx.split(module)

  def run(parameters: nnx.State, *arguments: Any) -> Any:
    return call(nnx.merge(graph, parameters), *arguments)

  if remat != "none":
    run = jax.checkpoint(run, policy=POLICIES[remat])
  return functools.partial(run, nnx.as_pure(parameters))


def keep(x: jax.Array) -> jax.Array:
  """Marks x to be saved for the backward pass by the policy `products`: the result of a matrix product, rows that were
  sent between devices, or a router's choice."""
  return checkpoint_name(x, PRODUCTS)


def of_kept(products: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `products`, a function of x and more, whose backward pass reads x as saved by `keep`.

  Only the backward pass sees the saved copy. JAX rounds a saved value that others use too (`reduce_precision`), for
  which XLA for TPU makes a separate pass over it.
  """
  run = jax.custom_vjp(products)

  def forwards(x: jax.Array, *more: Any) -> tuple[Any, tuple[Any, ...]]:
    return products(x, *more), (keep(x), *more)

  def backwards(kept: tuple[Any, ...], into: Any) -> tuple[Any, ...]:
    return jax.vjp(products, *kept)[1](into)

  run.defvjp(forwards, backwards)
  return run
