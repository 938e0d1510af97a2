"""Sends rows to the devices of their experts and back, by a ragged all-to-all.

R routed rows  D embed  E experts  P devices of the expert axis  Q the same devices as senders  X = P x e slices
Y = rows of the longest message

A device has e = E / P experts.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

Axis = tuple[str, ...]


class Slices(NamedTuple):
  """Arguments of `jax.lax.ragged_all_to_all`: e slices for each device, int32 [X]."""

  input_offsets_X: jax.Array
  send_sizes_X: jax.Array
  output_offsets_X: jax.Array
  """The offset of a slice at its receiver."""
  recv_sizes_X: jax.Array


class Transfers(NamedTuple):
  """The arguments of an exchange and of its reverse."""

  to_experts: Slices
  to_tokens: Slices
  sizes_e: jax.Array
  """The number of rows that each expert of this device receives. Rows arrive sorted by expert."""
  dropped: jax.Array
  """The number of rows of this device's tokens that did not fit at their receivers."""


def plan_transfers(sizes_E: jax.Array, axis: Axis, room: int) -> Transfers:
  """Computes which rows each device sends to which. All devices compute the same sizes.

  Args:
    sizes_E: number of rows of this device's tokens for each expert. The rows are sorted by expert.
    axis: mesh axes of the experts.
    room: number of rows that a device can receive. Further rows are dropped: those of the last senders for the last
      experts.
  """
  me, P = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
  counts_QE = jax.lax.all_gather(sizes_E, axis)
  counts_PeQ = counts_QE.reshape(P, P, -1).transpose(1, 2, 0)
  # A receiver sorts its rows by expert, and those of one expert by sender.
  flat = counts_PeQ.reshape(P, -1)
  offsets_PeQ = (jnp.cumsum(flat, axis=1) - flat).reshape(counts_PeQ.shape)
  sizes_PeQ = jnp.clip(room - offsets_PeQ, 0, counts_PeQ)
  offsets_PeQ = jnp.minimum(offsets_PeQ, room)
  starts_QPe = (jnp.cumsum(counts_QE, axis=1) - counts_QE).reshape(P, P, -1)
  from_me_Pe = sizes_PeQ[:, :, me]
  to_me_Qe = sizes_PeQ[me].T
  to_experts = Slices(starts_QPe[me], from_me_Pe, offsets_PeQ[:, :, me], to_me_Qe)
  to_tokens = Slices(offsets_PeQ[me].T, to_me_Qe, starts_QPe[:, me], from_me_Pe)
  to_experts, to_tokens = (Slices(*(x.reshape(-1) for x in slices)) for slices in (to_experts, to_tokens))
  return Transfers(to_experts, to_tokens, jnp.sum(to_me_Qe, axis=0), jnp.sum(sizes_E) - jnp.sum(from_me_Pe))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def exchange(x_RD: jax.Array, there: Slices, back: Slices, rows: int, longest: int, axis: Axis) -> jax.Array:
  """Returns the rows that this device receives, [rows, D], followed by zeros. The gradient takes the reverse exchange.

  Args:
    x_RD: the rows that this device sends.
    there: the arguments of this exchange.
    back: those of the reverse exchange.
    rows: number of rows of the result.
    longest: the largest number of rows that one device can send to another.
    axis: mesh axes of the experts.
  """
  # The exchange overwrites its zeros. Those that depend on the rows are written for each exchange; constant ones would
  # be written once, before the loop over layers, and copied for each exchange, which reads them too.
  zero, x_RD = jax.lax.optimization_barrier((jnp.zeros((), x_RD.dtype), x_RD))
  arguments = (x_RD, jnp.full((rows, x_RD.shape[1]), zero), *there)
  ragged = functools.partial(jax.lax.ragged_all_to_all, axis_name=axis)
  padded = functools.partial(_padded, longest=longest, axis=axis)
  return jax.lax.platform_dependent(*arguments, tpu=ragged, cuda=ragged, default=padded)


def _exchange_forward(
  x_RD: jax.Array, there: Slices, back: Slices, rows: int, longest: int, axis: Axis
) -> tuple[jax.Array, tuple[Slices, Slices, int]]:
  return exchange(x_RD, there, back, rows, longest, axis), (there, back, x_RD.shape[0])


def _exchange_backward(
  rows: int, longest: int, axis: Axis, saved: tuple[Slices, Slices, int], of_out: jax.Array
) -> tuple[jax.Array, None, None]:
  there, back, sent = saved
  return exchange(of_out, back, there, sent, longest, axis), None, None


exchange.defvjp(_exchange_forward, _exchange_backward)


def _padded(
  x_RD: jax.Array,
  out: jax.Array,
  input_offsets_X: jax.Array,
  send_sizes_X: jax.Array,
  output_offsets_X: jax.Array,
  recv_sizes_X: jax.Array,
  *,
  longest: int,
  axis: Axis,
) -> jax.Array:
  """`jax.lax.ragged_all_to_all` for backends that lack it (CPU), with messages padded to the longest possible."""
  P = jax.lax.axis_size(axis)
  sent_PY = _rows_of_messages(input_offsets_X.reshape(P, -1), send_sizes_X.reshape(P, -1), longest, len(x_RD))
  message_PYD = x_RD.at[sent_PY].get(mode="fill", fill_value=0)
  message_QYD = jax.lax.all_to_all(message_PYD, axis, 0, 0, tiled=True)
  offsets_X = jax.lax.all_to_all(output_offsets_X, axis, 0, 0, tiled=True)
  received_QY = _rows_of_messages(offsets_X.reshape(P, -1), recv_sizes_X.reshape(P, -1), longest, len(out))
  from_R = jnp.full(len(out), P * longest, jnp.int32)
  from_R = from_R.at[received_QY.reshape(-1)].set(jnp.arange(P * longest, dtype=jnp.int32), mode="drop")
  return message_QYD.reshape(P * longest, -1).at[from_R].get(mode="fill", fill_value=0)


def _rows_of_messages(offsets_Pe: jax.Array, sizes_Pe: jax.Array, longest: int, beyond: int) -> jax.Array:
  """The row at each place of the message to each device [P, Y], and `beyond` for the padding at its end."""
  ends_Pe = jnp.cumsum(sizes_Pe, axis=1)
  place_Y = jnp.arange(longest)
  slice_PY = jnp.sum(place_Y[None, :, None] >= ends_Pe[:, None, :], axis=-1)
  inside = jnp.minimum(slice_PY, offsets_Pe.shape[1] - 1)
  first_Pe = offsets_Pe - (ends_Pe - sizes_Pe)
  row_PY = jnp.take_along_axis(first_Pe, inside, axis=1) + place_Y[None, :]
  return jnp.where(slice_PY < offsets_Pe.shape[1], row_PY, beyond).astype(jnp.int32)
