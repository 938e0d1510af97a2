"""Products of 8-bit operands against a plain reference that rounds in NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moejax.kernels import eight_bits

TYPES = {"fp8": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2), "int8": (np.int8, np.int8)}
EQUATIONS = {
  "MD,DF->MF": ((24, 16), (16, 32)),
  "ERD,EDF->ERF": ((3, 8, 16), (3, 16, 8)),
  "MF,MD->DF": ((24, 8), (24, 16)),
}


def draw(seed, *shape):
  return np.asarray(jax.random.normal(jax.random.key(seed), shape)) * 10.0 ** (seed % 3)


def rounded(a, summed, dtype):
  """The values that 8 bits hold, at one scale for each slice along the axes that are not summed."""
  dtype = np.dtype(dtype)
  largest = 127 if dtype == np.int8 else float(ml_dtypes.finfo(dtype).max)
  scale = np.abs(a).max(axis=tuple(summed), keepdims=True) / np.float32(largest)
  scale = np.where(scale == 0, 1, scale).astype(np.float32)
  of_8 = np.round(a / scale) if dtype == np.int8 else a / scale
  return of_8.astype(dtype).astype(np.float32) * scale


@pytest.mark.parametrize("of_gradient", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize("bits", ["fp8", "int8"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_product_is_that_of_the_rounded_operands(equation, bits, of_gradient):
  operands, out = equation.split("->")
  (x, y), letters = (draw(seed, *shape) for seed, shape in enumerate(EQUATIONS[equation], 4)), operands.split(",")
  x[0] = 0  # a row of padding
  found = jax.jit(lambda x, y: eight_bits.einsum(equation, x, y, bits, of_gradient))(x, y)
  dtypes = TYPES[bits][int(of_gradient)], TYPES[bits][0]
  summed = [[axis for axis, letter in enumerate(of) if letter not in out] for of in letters]
  low = [rounded(a, axes, dtype) for a, axes, dtype in zip((x, y), summed, dtypes, strict=True)]
  expected = np.einsum(equation, *(a.astype(np.float64) for a in low))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
  exact = np.einsum(equation, x.astype(np.float64), y.astype(np.float64))
  error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
  assert 1e-3 < error < {"fp8": 0.08, "int8": 0.02}[bits]


@pytest.mark.parametrize("bits", ["fp8", "int8"])
def test_the_program_multiplies_8_bits(bits):
  def product(x, y):
    return eight_bits.einsum("MD,DF->MF", x, y, bits, True)

  text = jax.jit(product).lower(jnp.zeros((8, 4), jnp.bfloat16), jnp.zeros((4, 8), jnp.bfloat16)).as_text()
  (dot,) = [line for line in text.splitlines() if "dot_general" in line]
  for name in {"fp8": ("f8E5M2>", "f8E4M3FN>"), "int8": ("i8>",)}[bits]:
    assert name in dot, dot


@pytest.mark.parametrize("bits", ["fp8", "int8"])
def test_a_value_that_is_not_finite_reaches_the_result(bits):
  x = np.ones((4, 8), np.float32)
  x[1, 3] = np.nan
  found = np.asarray(eight_bits.einsum("MD,DF->MF", jnp.asarray(x), jnp.ones((8, 2)), bits))
  assert not np.isfinite(found[1]).any() and np.isfinite(np.delete(found, 1, axis=0)).all()
