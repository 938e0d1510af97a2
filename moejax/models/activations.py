"""The activations of feed-forward layers and experts."""

import jax
import jax.numpy as jnp

from moejax.config.model import Activation

CLIP, SHARPNESS = 7.0, 1.702
"""Largest input of swiglu_clipped, and the factor of the argument of its sigmoid."""


def activate(activation: Activation, gate: jax.Array | None, up: jax.Array) -> jax.Array:
  """The hidden units of `Model.activation`. `gate` is None if the activation has none."""
  if gate is None:
    return jax.nn.gelu(up)
  if activation == "geglu":
    return _geglu(gate, up)
  return _swiglu(gate, up) if activation == "swiglu" else _swiglu_clipped(gate, up)


@jax.custom_vjp
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  return _silu_product(gate, up)


def _silu_product(gate: jax.Array, up: jax.Array) -> jax.Array:
  return jax.nn.silu(gate) * up


def _swiglu_forwards(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _silu_product(gate, up), (gate, up)


def _swiglu_backwards(kept: tuple[jax.Array, jax.Array], into: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The barrier makes XLA for TPU write both gradients once, in the product that computes `into`. Without it XLA
  computes one of them again for every tile of the products that read it."""
  _, back = jax.vjp(_silu_product, *kept)
  return jax.lax.optimization_barrier(back(into))


_swiglu.defvjp(_swiglu_forwards, _swiglu_backwards)


def _geglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  return jax.nn.gelu(gate) * up


def _swiglu_clipped(gate: jax.Array, up: jax.Array) -> jax.Array:
  gate, up = jnp.minimum(gate, CLIP), jnp.clip(up, -CLIP, CLIP)
  return (up + 1) * gate * jax.nn.sigmoid(SHARPNESS * gate)
