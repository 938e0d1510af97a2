"""The experts of sorted rows on CPU: all products of a block of rows while its hidden units are in the cache.

R routed rows  E experts  D embed  F hidden
X = D x F, F x D, D or F
b is the number of rows of one block.

Separate grouped products would write the hidden units of all rows to memory and read them again.
"""

import functools

import jax
import jax.numpy as jnp

from moejax.config.model import Activation
from moejax.kernels.row_blocks import Block, row_blocks
from moejax.models.activations import activate
from moejax.models.moe.experts import Weights
from moejax.models.remat import keep

Arrays = dict[str, jax.Array]
"""By `gate`, `up` and `down`."""

Saved = tuple[jax.Array, jax.Array, Arrays, Arrays, Arrays]
"""rows_RD, sizes_E, the matrices and biases of all experts, and the products of the rows with gate and up."""


def feed_forward_on_cpu(rows_RD: jax.Array, sizes_E: jax.Array, weights: Weights) -> jax.Array:
  """Applies each expert to its rows, the first to sizes_E[0] rows, the next to sizes_E[1], and so on; returns out_RD.

  Computes in float32. The result, the products that the backward pass reads, and the gradient of the rows have the
  dtype of the rows. Rows beyond the sum of the sizes give zeros and have zero gradients, whatever they contain.
  """
  if len(rows_RD) == 0:
    return rows_RD
  values = {name: matrices.value for name, matrices in weights.matrices.items()}
  wide = {name: matrices.wide for name, matrices in weights.matrices.items() if matrices.wide is not None}
  sizes_E = sizes_E.astype(jnp.int32)
  return _feed_forward(weights.activation, bool(wide), rows_RD, sizes_E, values, wide, weights.biases)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _feed_forward(
  activation: Activation,
  widened: bool,
  rows_RD: jax.Array,
  sizes_E: jax.Array,
  values: Arrays,
  wide: Arrays,
  biases: Arrays,
) -> jax.Array:
  """If `widened`, the matrices in `wide` receive the gradients, in float32, in place of those in `values`."""
  return _forward(activation, widened, rows_RD, sizes_E, values, wide, biases)[0]


def _forward(
  activation: Activation,
  widened: bool,
  rows_RD: jax.Array,
  sizes_E: jax.Array,
  values: Arrays,
  wide: Arrays,
  biases: Arrays,
) -> tuple[jax.Array, Saved]:
  blocks, ends_E = row_blocks(len(rows_RD), len(sizes_E)), jnp.cumsum(sizes_E)
  into = [name for name in values if name != "down"]
  experts_E = _with_rows_first(sizes_E)

  def expert(i: jax.Array, out: tuple[jax.Array, Arrays]) -> tuple[jax.Array, Arrays]:
    e = experts_E[i]
    matrix, bias = _of_expert(values, e), _of_expert(biases, e)

    def apply(block: Block, out: tuple[jax.Array, Arrays]) -> tuple[jax.Array, Arrays]:
      out_RD, products_RF = out
      x_bD = block.rows(rows_RD).astype(jnp.float32)
      products_bF = {name: (x_bD @ matrix[name]).astype(rows_RD.dtype) for name in into}
      out_bD = _hidden(activation, products_bF, bias) @ matrix["down"]
      if "down" in bias:
        out_bD = out_bD + bias["down"][None]
      return block.put(out_RD, out_bD), {name: block.put(products_RF[name], products_bF[name]) for name in into}

    return blocks.fold(apply, ends_E[e] - sizes_E[e], ends_E[e], out)

  start_RF = {name: jnp.zeros((len(rows_RD), values[name].shape[2]), rows_RD.dtype) for name in into}
  out_RD, products_RF = jax.lax.fori_loop(0, jnp.sum(sizes_E > 0), expert, (jnp.zeros_like(rows_RD), start_RF))
  # Both are kept, since a backward pass that needs one of them would compute all three products again.
  products_RF = {name: keep(x_RF, "experts_in") for name, x_RF in products_RF.items()}
  return keep(out_RD, "experts_out"), (rows_RD, sizes_E, values, biases, products_RF)


def _backward(
  activation: Activation, widened: bool, saved: Saved, of_out_RD: jax.Array
) -> tuple[jax.Array, None, Arrays | None, Arrays | None, Arrays]:
  rows_RD, sizes_E, values, biases, products_RF = saved
  blocks, ends_E = row_blocks(len(rows_RD), len(sizes_E)), jnp.cumsum(sizes_E)
  experts_E = _with_rows_first(sizes_E)

  def expert(i: jax.Array, gradients: tuple[jax.Array, Arrays, Arrays]) -> tuple[jax.Array, Arrays, Arrays]:
    e = experts_E[i]
    matrix, bias = _of_expert(values, e), _of_expert(biases, e)

    def gradient(block: Block) -> tuple[jax.Array, tuple[Arrays, Arrays]]:
      x_bD, of_out_bD, products_bF = jax.tree.map(
        lambda a_RX: block.own_rows(a_RX).astype(jnp.float32), (rows_RD, of_out_RD, products_RF)
      )
      hidden_bF, back = jax.vjp(functools.partial(_hidden, activation), products_bF, bias)
      of_products_bF, of_bias = back(of_out_bD @ matrix["down"].T)
      of_x_bD = sum(of_product_bF @ matrix[name].T for name, of_product_bF in of_products_bF.items())
      of_matrix = {name: x_bD.T @ of_product_bF for name, of_product_bF in of_products_bF.items()}
      of_matrix["down"] = hidden_bF.T @ of_out_bD
      if "down" in bias:
        of_bias["down"] = jnp.sum(of_out_bD, axis=0)
      return of_x_bD, (of_matrix, of_bias)

    of_rows_RD, of_values, of_biases = gradients
    of_rows_RD, (of_matrix, of_bias) = blocks.sum(gradient, ends_E[e] - sizes_E[e], ends_E[e], of_rows_RD)
    return of_rows_RD, _with_expert(of_values, e, of_matrix), _with_expert(of_biases, e, of_bias)

  zeros_of_values = {name: jnp.zeros(w.shape, jnp.float32 if widened else w.dtype) for name, w in values.items()}
  zeros = jnp.zeros_like(rows_RD), zeros_of_values, jax.tree.map(jnp.zeros_like, biases)
  of_rows_RD, of_values, of_biases = jax.lax.fori_loop(0, jnp.sum(sizes_E > 0), expert, zeros)
  return of_rows_RD, None, *((None, of_values) if widened else (of_values, {})), of_biases


_feed_forward.defvjp(_forward, _backward)


def _with_rows_first(sizes_E: jax.Array) -> jax.Array:
  """The experts, of which only those with rows are visited."""
  return jnp.argsort(sizes_E == 0, stable=True)


def _of_expert(arrays: Arrays, e: jax.Array) -> Arrays:
  return jax.tree.map(lambda a_EX: jax.lax.dynamic_index_in_dim(a_EX, e, keepdims=False).astype(jnp.float32), arrays)


def _with_expert(arrays: Arrays, e: jax.Array, own: Arrays) -> Arrays:
  def put(a_EX: jax.Array, own_X: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(a_EX, own_X.astype(a_EX.dtype), e, axis=0)

  return jax.tree.map(put, arrays, own)


def _hidden(activation: Activation, products_bF: Arrays, bias: Arrays) -> jax.Array:
  """The hidden units, in float32, of rows whose products with gate and up of one expert these are."""

  def biased(name: str) -> jax.Array:
    product_bF = products_bF[name].astype(jnp.float32)
    return product_bF + bias[name][None] if name in bias else product_bF

  return activate(activation, biased("gate") if "gate" in products_bF else None, biased("up"))
