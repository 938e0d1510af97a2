"""The small parts: one way to declare a weight, RMSNorm, rotary positions, stacking.

B batch  T position  S slot  D embed  N heads  K key/value heads  H head dim  L stacked layers
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moejax.partitioning import Names


class Context(NamedTuple):
  """What every layer needs to know of the tokens."""

  segments_BT: jax.Array
  positions_BT: jax.Array
  angles: tuple[jax.Array, jax.Array]


class Memory(NamedTuple):
  """Keys and values of one layer's earlier tokens: what stands at position p of its sequence lies at slot p."""

  k_BSKH: jax.Array
  v_BSKH: jax.Array


PRODUCTS = "products"
"""Name of what layers may keep for the backward pass (`jax.checkpoint`) beside attention's, as `keep` gives it."""


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], names: Names, fan_in: int, gain: float = 1.0) -> nnx.Param:
  """A float32 matrix drawn from a normal, cut at two deviations, of deviation gain / sqrt(fan_in).

  | weight                                        | fan_in          | gain            |
  |-----------------------------------------------|-----------------|-----------------|
  | embedding, output projection                  | D               | 1               |
  | query, key, value, router, gate, up           | D               | 1               |
  | attention output, feed-forward down           | what they sum   | 1 / sqrt(2 L)   |
  """
  # 0.8796 is the deviation of a unit normal cut at two deviations.
  scale = gain / math.sqrt(fan_in) / 0.87962566
  value = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32) * scale
  return nnx.Param(value, names=names)


def residual_gain(num_layers: int) -> float:
  """Gain of what writes to the residual stream: 2 L writes add up to unit variance (GPT-2)."""
  return 1.0 / math.sqrt(2 * num_layers)


def keep(x: jax.Array) -> jax.Array:
  """x, which is not computed again where there is memory for it: a product, rows that travelled, or a choice."""
  return checkpoint_name(x, PRODUCTS)


def of_kept(products: Callable[..., Any]) -> Callable[..., Any]:
  """`products` of x and more, of which x is kept as by `keep`, but for their backward pass alone: what is kept of a
  value that others use too is rounded by JAX (`reduce_precision`), which XLA for TPU does in a pass of its own."""
  run = jax.custom_vjp(products)

  def forwards(x: jax.Array, *more: Any) -> tuple[Any, tuple[Any, ...]]:
    return products(x, *more), (keep(x), *more)

  def backwards(kept: tuple[Any, ...], into: Any) -> tuple[Any, ...]:
    return jax.vjp(products, *kept)[1](into)

  run.defvjp(forwards, backwards)
  return run


def activate(gate: jax.Array | None, up: jax.Array) -> jax.Array:
  """silu(gate) x up (SwiGLU, arXiv 2002.05202), or gelu(up) where there is no gate."""
  return jax.nn.gelu(up) if gate is None else _swiglu(gate, up)


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  return jax.nn.silu(gate) * up


_swiglu = jax.custom_vjp(_gated)


def _swiglu_forwards(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _gated(gate, up), (gate, up)


def _swiglu_backwards(kept: tuple[jax.Array, jax.Array], into: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Both gradients are written once, by the product that gives `into`: without the barrier XLA for TPU computes one of
  them again for every tile of the products that take it."""
  _, back = jax.vjp(_gated, *kept)
  return jax.lax.optimization_barrier(back(into))


_swiglu.defvjp(_swiglu_forwards, _swiglu_backwards)


class RMSNorm(nnx.Module):
  """x / rms(x) x scale over the last dimension, in float32 (arXiv 1910.07467)."""

  def __init__(self, width: int, epsilon: float, name: str | None):
    self.scale_D = nnx.Param(jnp.ones((width,), jnp.float32), names=(name,))
    self.epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    with jax.named_scope("norm"):
      x32 = x.astype(jnp.float32)
      inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
      scale = self.scale_D[...].reshape((1,) * (x.ndim - 1) + (-1,))
      return (x32 * inverse_rms * scale).astype(x.dtype)


def rotary_angles(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """cosine and sine of the rotation of each pair, each [B, T, 1, H / 2] in float32 (arXiv 2104.09864).

  float32: bfloat16 rounds position 257 to 256.
  """
  frequency_H = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle_BTH = positions_BT.astype(jnp.float32)[:, :, None] * frequency_H[None, None, :]
  return jnp.cos(angle_BTH)[:, :, None], jnp.sin(angle_BTH)[:, :, None]


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array], by_product: bool = False) -> jax.Array:
  """Rotates the pairs (i, i + H / 2), as Llama's checkpoints expect.

  `by_product` swaps the halves by a product with a signed permutation, which is exact: on TPU halves of 64 lanes are
  copied and padded otherwise, which takes longer; on CPU the product does.
  """
  cosine, sine = angles
  if by_product:
    H = x_BTNH.shape[-1]
    swap_HH = jnp.roll(jnp.eye(H, dtype=x_BTNH.dtype), H // 2, axis=0).at[H // 2 :].multiply(-1)
    swapped_BTNH = jnp.einsum("BTNH,HJ->BTNJ", x_BTNH, swap_HH, precision=jax.lax.Precision.HIGHEST)
    cosine, sine = (jnp.concatenate([part, part], axis=-1) for part in angles)
    return (x_BTNH.astype(jnp.float32) * cosine + swapped_BTNH.astype(jnp.float32) * sine).astype(x_BTNH.dtype)
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
  return rotated.astype(x_BTNH.dtype)


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
  """`length` modules as a list, with the very numbers that `stack` gives them."""
  return nnx.List([make(nnx.Rngs(params=key)) for key in jax.random.split(rngs.params(), length)])
