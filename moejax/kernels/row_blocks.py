"""Loops over the rows of a group by blocks, which fit in the cache of a CPU.

R routed rows  E experts  D embed  F hidden
X = D or F
b is the number of rows of one block.

Rows are sorted by group. A group is split into large blocks, and small ones for the rest. The last block may reach into
another group, whose rows it does not own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Block:
  """Some of R rows."""

  start: jax.Array
  own_b: jax.Array
  """False for rows of other groups or of none."""

  def rows(self, x_RX: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_RX, self.start, len(self.own_b), axis=0)

  def own_rows(self, x_RX: jax.Array) -> jax.Array:
    """The rows with zeros in place of those of others, which may be infinite."""
    return jnp.where(self.own_b[:, None], self.rows(x_RX), 0)

  def put(self, x_RX: jax.Array, rows_bX: jax.Array) -> jax.Array:
    """x_RX with these rows in place of its own."""
    rows_bX = jnp.where(self.own_b[:, None], rows_bX.astype(x_RX.dtype), self.rows(x_RX))
    return jax.lax.dynamic_update_slice_in_dim(x_RX, rows_bX, self.start, axis=0)


@dataclasses.dataclass(frozen=True)
class RowBlocks:
  """How groups of R rows are split."""

  R: int
  large: int
  small: int

  def fold(self, update: Callable[[Block, Any], Any], start: jax.Array, end: jax.Array, carry: Any) -> Any:
    """Returns the carry after `update(block, carry)` for each block of the rows from `start` to `end`."""
    count = self._large_blocks(end - start)
    rest = jnp.minimum(start + count * self.large, end)
    more = (end - rest + self.small - 1) // self.small

    def at(first: jax.Array, size: int) -> Callable[[jax.Array, Any], Any]:
      return lambda i, carry: update(self._block(first + i * size, end, size), carry)

    return jax.lax.fori_loop(0, more, at(rest, self.small), jax.lax.fori_loop(0, count, at(start, self.large), carry))

  def sum(
    self, product: Callable[[Block], tuple[Any, Any]], start: jax.Array, end: jax.Array, out_RX: Any
  ) -> tuple[Any, Any]:
    """Puts the rows that `product(block)` returns for each block into `out_RX`, and sums its second result over the
    blocks. There is always one block, which may own no rows."""
    large = self._large_blocks(end - start) > 0
    first = self._block(start, end, self.large)

    def padded_small() -> tuple[Any, Any]:
      block = self._block(start, end, self.small)
      rows_bX, term = product(block)
      pad = functools.partial(_pad, before=block.start - first.start, length=self.large)
      return jax.tree.map(pad, rows_bX), term

    # The first block starts the sum: zeros to add to would cost another pass over it. The result is put into place
    # outside of the conditional, which would copy all R rows.
    rows_bX, total = jax.lax.cond(large, lambda: product(first), padded_small)

    def add(block: Block, so_far: tuple[Any, Any]) -> tuple[Any, Any]:
      out_RX, total = so_far
      rows_bX, term = product(block)
      return jax.tree.map(block.put, out_RX, rows_bX), jax.tree.map(jnp.add, total, term)

    start = jnp.minimum(start + jnp.where(large, self.large, self.small), end)
    return self.fold(add, start, end, (jax.tree.map(first.put, out_RX, rows_bX), total))

  def _large_blocks(self, rows: jax.Array) -> jax.Array:
    """The number of large blocks for so many rows. The last one may lack up to a quarter of its rows, since small
    blocks would compute the others in six passes or more (three if the large block has 128 rows)."""
    return (rows + self.large // 4) // self.large

  def _block(self, first: jax.Array, end: jax.Array, size: int) -> Block:
    """A block of rows within R that owns those from `first` to `end`."""
    start = jnp.minimum(first, self.R - size)
    rows_b = start + jnp.arange(size, dtype=jnp.int32)
    return Block(start, (first <= rows_b) & (rows_b < end))


def row_blocks(R: int, E: int) -> RowBlocks:
  """The blocks for R rows of E groups.

  A large block has the mean size of a group, rounded to a power of two within bounds: products of fewer than 32 rows
  are not cheaper, and those of more than 512 rows are not faster per row. A small block has an eighth of that, but at
  least 32 rows, since small blocks waste fewer rows, but each costs a pass over the matrix of its group.
  """
  large = min(max(1 << max(R // E, 1).bit_length() - 1, 128), 512)
  return RowBlocks(R, min(large, R), min(max(large // 8, 32), R))


def _pad(rows_bX: jax.Array, before: jax.Array, length: int) -> jax.Array:
  """The rows with zeros around them."""
  return jax.lax.dynamic_update_slice_in_dim(jnp.zeros((length, rows_bX.shape[1]), rows_bX.dtype), rows_bX, before, 0)
