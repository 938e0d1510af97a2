"""Rows to the devices of their experts and back, each over the link once: a ragged all-to-all.

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
  """Where a slice begins at its receiver."""
  recv_sizes_X: jax.Array


class Transfers(NamedTuple):
  """An exchange and its reverse."""

  to_experts: Slices
  to_tokens: Slices
  sizes_e: jax.Array
  """Rows that each expert of this device receives; they come sorted by expert."""
  dropped: jax.Array
  """Rows of this device's tokens that found no room."""


def plan_transfers(sizes_E: jax.Array, axis: Axis, room: int) -> Transfers:
  """Who sends how many rows where, known to all devices.

  Args:
    sizes_E: rows of this device's tokens for every expert, in whose order they lie.
    axis: mesh axes of the experts.
    room: rows that a device can receive; of what is beyond, the last experts' rows of the last senders are dropped.
  """
  me, P = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
  counts_QE = jax.lax.all_gather(sizes_E, axis)
  counts_PeQ = counts_QE.reshape(P, P, -1).transpose(1, 2, 0)
  # A receiver has its rows sorted by expert, those of one expert by sender.
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
  """What this device receives, [rows, D]; zeros where nothing arrives. The gradient goes the way back.

  Args:
    x_RD: what it sends.
    there: this exchange.
    back: the reverse one.
    rows: rows of the result.
    longest: most rows that one device can send to another.
    axis: mesh axes of the experts.
  """
  arguments = (x_RD, jnp.zeros((rows, x_RD.shape[1]), x_RD.dtype), *there)
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
  """`jax.lax.ragged_all_to_all` for backends without it (CPU): messages padded to the longest possible."""
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
  """[P, Y]: the row that stands at each place of each device's message, `beyond` for the padding at its end."""
  ends_Pe = jnp.cumsum(sizes_Pe, axis=1)
  place_Y = jnp.arange(longest)
  slice_PY = jnp.sum(place_Y[None, :, None] >= ends_Pe[:, None, :], axis=-1)
  inside = jnp.minimum(slice_PY, offsets_Pe.shape[1] - 1)
  first_Pe = offsets_Pe - (ends_Pe - sizes_Pe)
  row_PY = jnp.take_along_axis(first_Pe, inside, axis=1) + place_Y[None, :]
  return jnp.where(slice_PY < offsets_Pe.shape[1], row_PY, beyond).astype(jnp.int32)
