"""The experts of few tokens on CPU, as in decoding: one loop over the experts that any token chose.

Each of these experts is applied to all tokens, since reading its matrices takes longer than the products. Sorting the
rows, and a product for the rows of each expert, would take longer (`tests/benchmarks/decode.py`).

A product with a slice of a stack copies the slice first, which takes as long as the product. Where the matrices are
arrays of their own (`moejax/inference/expert_views.py`), a conditional selects the product, and nothing is copied.

M tokens  A experts per token  D embed  F hidden  E experts
"""

import functools

import jax
import jax.numpy as jnp

from moejax.models.moe.experts import Matrices, Weights

MOST_CODE = 16
"""Maximum number of experts for products with one row. XLA generates code for each of them, which reads matrices 1.3
times as fast as the library that it calls for two rows, but takes about 8 ms per matrix to compile."""


def visit_experts(
  x_MD: jax.Array, experts_MA: jax.Array, weights_MA: jax.Array, chosen_MA: jax.Array, weights: Weights
) -> jax.Array:
  """Returns the weighted sum of the experts of each token, out_MD in float32. Has no gradient.

  Args:
    x_MD: the tokens.
    experts_MA: the chosen experts. Those outside 0 to E - 1 add nothing.
    weights_MA: the weight of each choice, float32.
    chosen_MA: False makes a choice void.
    weights: the matrices of the E experts.
  """
  M, E = len(x_MD), len(weights["up"].value)
  rows = max(M, 1 if E <= MOST_CODE else 2)
  x_MD, experts_MA, weights_MA, chosen_MA = (
    jnp.pad(x, ((0, rows - M), (0, 0))) for x in (x_MD, experts_MA, weights_MA, chosen_MA)
  )
  is_expert_MAE = (experts_MA[..., None] == jnp.arange(E)[None, None]) & chosen_MA[..., None]
  weights_ME = jnp.sum(jnp.where(is_expert_MAE, weights_MA[..., None], 0.0), axis=1)
  takes_ME = jnp.any(is_expert_MAE, axis=1)
  used_E = jnp.any(takes_ME, axis=0)
  experts_E = jnp.argsort(~used_E, stable=True)
  dtype, x_MD = x_MD.dtype, x_MD.astype(jnp.float32)

  def visit(i: jax.Array, out_MD: jax.Array) -> jax.Array:
    e = experts_E[i]

    def bias(name: str) -> jax.Array:
      return jax.lax.dynamic_index_in_dim(weights.biases[name], e).astype(jnp.float32)

    def times(x: jax.Array, name: str) -> jax.Array:
      return _times(x, weights[name].value, e, dtype)

    def biased(x: jax.Array, name: str) -> jax.Array:
      return x + bias(name) if name in weights.biases else x

    gate_MF = biased(times(x_MD, "gate"), "gate") if "gate" in weights else None
    hidden_MF = weights.activate(gate_MF, biased(times(x_MD, "up"), "up")) * weights_ME[:, e, None]
    # Not a product with 0: the output of an expert that the token did not choose may be infinite.
    out_MD = out_MD + times(jnp.where(takes_ME[:, e, None], hidden_MF, 0.0), "down")
    if "down" in weights.biases:
      out_MD = out_MD + weights_ME[:, e, None] * bias("down")
    return out_MD

  return jax.lax.fori_loop(0, jnp.sum(used_E), visit, jnp.zeros(x_MD.shape, jnp.float32))[:M]


def _times(x: jax.Array, matrices: Matrices, e: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """`x` times the matrix of expert `e`, rounded to `dtype`."""

  def times(matrix: jax.Array) -> jax.Array:
    return x @ matrix.astype(dtype).astype(jnp.float32)

  if isinstance(matrices, tuple):
    return jax.lax.switch(e, [functools.partial(times, matrix) for matrix in matrices])
  return times(jax.lax.dynamic_index_in_dim(matrices, e, keepdims=False))
