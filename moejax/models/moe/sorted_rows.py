"""Sorts the choices of tokens by expert, gathers tokens into that order, and sums rows back into tokens.

M tokens  A experts per token  R routed rows  D embed  E experts  X = M x A
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Order(NamedTuple):
  """The choices of M tokens, sorted by expert. Void choices come last and have no expert."""

  choice_R: jax.Array
  """The choice of each row (token x A + a), int32."""
  row_MA: jax.Array
  """The row of each choice, int32. R if it has none."""
  sizes_E: jax.Array
  """The number of rows of each expert, int32, together at most R. Further rows are void."""


def sort_by_expert(experts_MA: jax.Array, chosen_MA: jax.Array, num_experts: int, rows: int) -> Order:
  """The first `rows` choices, sorted by expert, and those of one expert by token.

  Args:
    experts_MA: the experts; choices outside 0 to num_experts - 1 are void.
    chosen_MA: False makes a choice void.
    num_experts: E.
    rows: R, at least the number of choices that can be valid.
  """
  real_MA = chosen_MA & (experts_MA >= 0) & (experts_MA < num_experts)
  expert_X = jnp.where(real_MA, experts_MA, num_experts).reshape(-1).astype(jnp.int32)
  choice_R = _stable_argsort(expert_X, num_experts + 1)[:rows]
  row_X = jnp.full(expert_X.shape, rows, jnp.int32).at[choice_R].set(jnp.arange(rows, dtype=jnp.int32))
  row_MA = jnp.where(real_MA, row_X.reshape(experts_MA.shape), rows)
  is_expert_XE = expert_X[:, None] == jnp.arange(num_experts)[None, :]
  return Order(choice_R, row_MA, jnp.sum(is_expert_XE, axis=0, dtype=jnp.int32))


def _stable_argsort(key_X: jax.Array, limit: int) -> jax.Array:
  """The index of each element of the sorted keys, which are 0 to limit - 1. If key and index fit in one integer,
  sorting takes half the time of sorting pairs."""
  X = len(key_X)
  if limit * X >= 2**31:
    return jnp.argsort(key_X, stable=True).astype(jnp.int32)
  return jnp.sort(key_X * X + jnp.arange(X, dtype=jnp.int32)) % X


@jax.custom_vjp
def take_rows(x_MD: jax.Array, order: Order) -> jax.Array:
  """Returns rows_RD, the token of each row. In the backward pass a token gathers the gradients of its rows, since a
  scatter is slow. The gradients of void rows are ignored."""
  return x_MD[order.choice_R // order.row_MA.shape[-1]]


def _take_forward(x_MD: jax.Array, order: Order) -> tuple[jax.Array, Order]:
  return take_rows(x_MD, order), order


def _take_backward(order: Order, of_rows_RD: jax.Array) -> tuple[jax.Array, None]:
  ones_MA = jnp.ones(order.row_MA.shape, jnp.float32)
  return combine_rows(of_rows_RD, ones_MA, order).astype(of_rows_RD.dtype), None


take_rows.defvjp(_take_forward, _take_backward)


@jax.custom_vjp
def combine_rows(rows_RD: jax.Array, weights_MA: jax.Array, order: Order) -> jax.Array:
  """Returns out_MD, the weighted sum of the rows of each token, in float32. In the backward pass rows gather the
  gradient of their token."""
  out_MD = jnp.zeros((weights_MA.shape[0], rows_RD.shape[-1]), jnp.float32)
  for a in range(weights_MA.shape[-1]):  # one row at a time: all A at once would need another [R, D]
    out_MD = out_MD + _rows_of_choice(rows_RD, order, a) * weights_MA[:, a, None]
  return out_MD


def _combine_forward(
  rows_RD: jax.Array, weights_MA: jax.Array, order: Order
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Order]]:
  return combine_rows(rows_RD, weights_MA, order), (rows_RD, weights_MA, order)


def _combine_backward(
  saved: tuple[jax.Array, jax.Array, Order], of_out_MD: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  rows_RD, weights_MA, order = saved
  real_R = jnp.arange(len(order.choice_R)) < jnp.sum(order.sizes_E)
  weight_R = jnp.where(real_R, weights_MA.reshape(-1)[order.choice_R], 0.0)
  of_token_RD = of_out_MD[order.choice_R // weights_MA.shape[-1]]
  of_rows_RD = (of_token_RD * weight_R[:, None]).astype(rows_RD.dtype)
  of_weight_R = jnp.sum(of_token_RD * rows_RD.astype(jnp.float32), axis=-1)
  return of_rows_RD, of_weight_R.at[order.row_MA].get(mode="fill", fill_value=0), None


combine_rows.defvjp(_combine_forward, _combine_backward)


def _rows_of_choice(rows_RD: jax.Array, order: Order, a: int) -> jax.Array:
  """The row of choice a of every token in float32, zeros if it is void."""
  return rows_RD.at[order.row_MA[:, a]].get(mode="fill", fill_value=0).astype(jnp.float32)
