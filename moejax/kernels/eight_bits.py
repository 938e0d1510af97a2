"""Matrix products of 8-bit operands, by qwix, a quantization library for JAX.

An operand is divided by a scale, rounded to 8 bits, and the product is multiplied by the scales. A scale is the largest
absolute value along the contracted dimensions, over the largest number of the type. There is thus one scale for each
row and column, which does not depend on the mesh. CPUs have no such products: XLA computes them from the same rounded
operands.

R routed rows  E experts  D embed
"""

from typing import Literal

import jax
import jax.numpy as jnp
import qwix

EightBits = Literal["fp8", "int8"]

VALUES = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
"""Types of activations and weights."""

GRADIENTS = {"fp8": jnp.float8_e5m2, "int8": jnp.int8}
"""Types of incoming gradients, which need more range and less precision (arXiv 2209.05433)."""


CALIBRATION = {"fp8": "absmax", "int8": f"absmax,{127.5 / 127}"}
"""The largest absolute value becomes the largest number of the type. By default qwix makes it 127.5, which a difference
in the last digit rounds to 127 or to 128."""


def einsum(equation: str, x: jax.Array, y: jax.Array, bits: EightBits, of_gradient: bool = False) -> jax.Array:
  """`jnp.einsum` of two arrays that are rounded to 8 bits, in float32.

  Args:
    equation: every letter of one operand is one of the other operand or of the result.
    x: activations, or an incoming gradient if `of_gradient`.
    y: activations or a weight.
    bits: the type of the operands.
    of_gradient: whether x is an incoming gradient.
  """
  of_x, of_y, out = letters(equation)

  def rounded(of_a: str, a: jax.Array, dtype: jnp.dtype) -> qwix.QArray:
    kept = [axis for axis, letter in enumerate(of_a) if letter in out]
    return qwix.quantize(a.astype(jnp.float32), dtype, channelwise_axes=kept, calibration_method=CALIBRATION[bits])

  return qwix.einsum(
    equation,
    rounded(of_x, x, jnp.dtype((GRADIENTS if of_gradient else VALUES)[bits])),
    rounded(of_y, y, jnp.dtype(VALUES[bits])),
  )


def scales(largest: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """The scales of values whose largest absolute values, in float32, are `largest`: those of qwix."""
  found = largest / jnp.float32(_limit(dtype))
  return jnp.where(found < jnp.sqrt(jnp.finfo(jnp.float32).tiny), 1.0, found)


def to_eight_bits(scaled: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Rounds values in float32 that were divided by their scale."""
  limit = _limit(dtype)
  return (jnp.round(scaled) if sum_dtype(dtype) == jnp.int32 else jnp.clip(scaled, -limit, limit)).astype(dtype)


def rounded_groups(x_RD: jax.Array, scales_ED: jax.Array, group_sizes_E: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Rounds the rows of each group at its own scales. Rows are sorted by group."""
  group_R = jnp.repeat(jnp.arange(len(scales_ED)), group_sizes_E, total_repeat_length=len(x_RD))
  return to_eight_bits(x_RD.astype(jnp.float32) * (1 / scales_ED)[group_R], dtype)


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """The type in which matrix units sum products of this type."""
  return jnp.dtype(jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32)


def _limit(dtype: jnp.dtype) -> float:
  return float((jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).max)


def letters(equation: str) -> tuple[str, str, str]:
  """The letters of both operands and of the result of an einsum."""
  operands, out = equation.split("->")
  of_x, of_y = operands.split(",")
  return of_x, of_y, out
