"""Layers of equal structure, stacked for a scan or kept apart."""

from collections.abc import Callable

import jax
from flax import nnx


def stack(make: Callable[[nnx.Rngs], nnx.Module], length: int, rngs: nnx.Rngs) -> nnx.Module:
  """`length` modules as one, every parameter with a leading `layers` dimension, each drawn from its own key."""

  def parameters(key: jax.Array) -> nnx.State:
    return nnx.split(make(nnx.Rngs(params=key)))[1]

  graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=0))))[0]
  stacked = jax.vmap(parameters)(jax.random.split(rngs.params(), length))

  def named(variable: nnx.Variable) -> nnx.Variable:
    return variable.replace(names=("layers", *variable.names))

  return nnx.merge(graph, jax.tree.map(named, stacked, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def separate(make: Callable[[nnx.Rngs], nnx.Module], length: int, rngs: nnx.Rngs) -> nnx.Module:
  """`length` modules as a list, with the same values as in `stack`."""
  return nnx.List([make(nnx.Rngs(params=key)) for key in jax.random.split(rngs.params(), length)])
