"""Products of activations with weights: operands in the type of activations, gradients of weights in float32.

By default JAX gives a weight's gradient the dtype of the operand: a product in bfloat16 would round the gradient of
each device to 8 bits before the devices are summed. Here an operand has two forms, one of which receives the gradient.

Products of 8-bit operands round activations, weights and incoming gradients for each of the three products.

M tokens  V vocab  D embed
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moejax.config.model import GradientDtype
from moejax.config.precision import Operands
from moejax.kernels import eight_bits

Dtypes = tuple[jnp.dtype | None, jnp.dtype | None, jnp.dtype]
"""Of the result of a product, of its gradient in the backward pass (None: as it is), and of the weight's gradient."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operand:
  """A weight as an operand of products. Apply reshapes to both of its forms with `jax.tree.map`."""

  value: jax.Array
  """The weight in the dtype of activations."""
  wide: jax.Array | None
  """The weight in float32, which receives the gradient and which no product reads. None if `value` receives it."""
  bits: Operands = dataclasses.field(default="compute", metadata={"static": True})
  """Type to which products round their operands. "compute" does not round them."""

  @property
  def shape(self) -> tuple[int, ...]:
    return self.value.shape


def operand(weight: jax.Array, dtype: jnp.dtype, gradients: GradientDtype, bits: Operands = "compute") -> Operand:
  """A float32 weight as an operand for activations of this dtype."""
  if gradients == "compute" or weight.dtype == dtype:
    return Operand(weight.astype(dtype), None, bits)
  return Operand(jax.lax.stop_gradient(weight.astype(dtype)), weight, bits)


def product(
  equation: str, x: jax.Array, weight: Operand, result: jnp.dtype | None = None, rounds_gradient: bool = False
) -> jax.Array:
  """`jnp.einsum` of activations and a weight.

  Args:
    equation: every letter of the weight is one of the other operand or of the result.
    x: activations.
    weight: the weight.
    result: dtype of the result. None means that of the activations.
    rounds_gradient: whether the gradient of a wider result is rounded to the dtype of activations before the products
      of the backward pass, which GPUs would otherwise compute in float32. TPUs round within these products.
  """
  if weight.bits != "compute":
    receiver = weight.value if weight.wide is None else weight.wide
    value = jax.lax.stop_gradient(weight.value)
    return _rounded_product(equation, result or x.dtype, weight.bits, receiver.dtype, x, value, receiver)
  if weight.wide is None and result in (None, x.dtype):
    return jnp.einsum(equation, x, weight.value)
  receiver = weight.value if weight.wide is None else weight.wide
  of_result = x.dtype if rounds_gradient else result
  return _product(equation, (result, of_result, receiver.dtype), x, jax.lax.stop_gradient(weight.value), receiver)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, dtypes: Dtypes, x: jax.Array, value: jax.Array, receiver: jax.Array) -> jax.Array:
  """The product of x and `value`. `receiver` receives the gradient of the weight."""
  return jnp.einsum(equation, x, value, preferred_element_type=dtypes[0])


def _product_forward(
  equation: str, dtypes: Dtypes, x: jax.Array, value: jax.Array, receiver: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _product(equation, dtypes, x, value, receiver), (x, value)


def _product_backward(
  equation: str, dtypes: Dtypes, saved: tuple[jax.Array, jax.Array], of_out: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
  (x, value), (_, of_result, gradient) = saved, dtypes
  of_activations, of_weight, out = eight_bits.letters(equation)
  of_out = of_out.astype(of_result or of_out.dtype)
  (of_x,) = jax.vjp(lambda x: jnp.einsum(equation, x, value, preferred_element_type=of_out.dtype), x)[1](of_out)
  of_w = jnp.einsum(f"{of_activations},{out}->{of_weight}", x, of_out, preferred_element_type=gradient)
  return of_x, None, of_w


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _rounded_product(
  equation: str,
  result: jnp.dtype,
  bits: eight_bits.EightBits,
  gradient: jnp.dtype,
  x: jax.Array,
  value: jax.Array,
  receiver: jax.Array,
) -> jax.Array:
  """The product of rounded operands. `receiver`, whose dtype is `gradient`, receives the gradient of the weight."""
  return eight_bits.einsum(equation, x, value, bits).astype(result)


def _rounded_forward(
  equation: str,
  result: jnp.dtype,
  bits: eight_bits.EightBits,
  gradient: jnp.dtype,
  x: jax.Array,
  value: jax.Array,
  receiver: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _rounded_product(equation, result, bits, gradient, x, value, receiver), (x, value)


def _rounded_backward(
  equation: str,
  result: jnp.dtype,
  bits: eight_bits.EightBits,
  gradient: jnp.dtype,
  saved: tuple[jax.Array, jax.Array],
  of_out: jax.Array,
) -> tuple[jax.Array, None, jax.Array]:
  x, value = saved
  of_activations, of_weight, out = eight_bits.letters(equation)
  of_x = eight_bits.einsum(f"{out},{of_weight}->{of_activations}", of_out, value, bits, of_gradient=True)
  of_w = eight_bits.einsum(f"{out},{of_activations}->{of_weight}", of_out, x, bits, of_gradient=True)
  return of_x.astype(x.dtype), None, of_w.astype(gradient)


_rounded_product.defvjp(_rounded_forward, _rounded_backward)


def exact_product(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """`jnp.einsum` in full float32. By default TPUs and GPUs round its operands to fewer bits."""
  return jnp.einsum(equation, x, weight, precision=jax.lax.Precision.HIGHEST)


def look_up(table: Operand, rows: jax.Array) -> jax.Array:
  """Rows of a table [V, D] by index."""
  return table.value[rows] if table.wide is None else _look_up(len(table.value), table.value, table.wide, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(V: int, value_VD: jax.Array, wide_VD: jax.Array, rows: jax.Array) -> jax.Array:
  return value_VD[rows]


def _look_up_forward(V: int, value_VD: jax.Array, wide_VD: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  return value_VD[rows], rows


def _look_up_backward(V: int, rows: jax.Array, of_out: jax.Array) -> tuple[None, jax.Array, None]:
  of_wide_VD = jnp.zeros((V, of_out.shape[-1]), jnp.float32).at[rows].add(of_out.astype(jnp.float32))
  return None, of_wide_VD, None


_look_up.defvjp(_look_up_forward, _look_up_backward)
