"""The activation of feed-forward layers and experts."""

import jax


def activate(gate: jax.Array | None, up: jax.Array) -> jax.Array:
  """silu(gate) x up (SwiGLU, arXiv 2002.05202), or gelu(up) if there is no gate."""
  return jax.nn.gelu(up) if gate is None else _swiglu(gate, up)


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  return jax.nn.silu(gate) * up


_swiglu = jax.custom_vjp(_gated)


def _swiglu_forwards(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _gated(gate, up), (gate, up)


def _swiglu_backwards(kept: tuple[jax.Array, jax.Array], into: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The barrier makes XLA for TPU write both gradients once, in the product that computes `into`. Without it XLA
  computes one of them again for every tile of the products that read it."""
  _, back = jax.vjp(_gated, *kept)
  return jax.lax.optimization_barrier(back(into))


_swiglu.defvjp(_swiglu_forwards, _swiglu_backwards)
