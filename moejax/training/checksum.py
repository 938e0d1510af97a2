"""Checksums of arrays: computed where the arrays are, equal on every mesh, and different if one bit is.

Each element is hashed together with its place in the whole array, and the hashes are added modulo 2^32. An integer sum
does not depend on its order, so that neither the mesh nor the number of processes makes a difference, and no array is
gathered or copied. The hash is a bijection of the element for each place: a change of one element is always found, and
any other damage with probability 1 - 2^-64.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

LANES = (0x243F6A88, 0x85A308D3)
"""Start values of two independent sums, from the digits of pi."""


def checksums(tree: Any) -> dict[str, str]:
  """The checksum of each array of a tree, by its path: 16 hexadecimal digits."""

  def checksum(leaf: jax.Array) -> str:
    # Waits for each: of many programs at once, each with a collective, simulated devices on few cores may deadlock.
    lanes = jax.device_get(_sum_of_hashes(leaf.sharding)(leaf))
    return np.asarray(lanes, ">u4").tobytes().hex()

  return {array_name(path): checksum(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def array_name(path: Iterable[Any]) -> str:
  """`parameters.embedding.w_VD` from a tree path."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator=".")


@functools.cache
def _sum_of_hashes(sharding: NamedSharding) -> jax.stages.Wrapped:
  """The function for arrays placed so; all processes get its result."""
  return jax.jit(_lanes, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))


def _lanes(array: jax.Array) -> jax.Array:
  """uint32 [2]."""
  bits = _bits(array)
  return jnp.stack([jnp.sum(_mix(bits ^ _places(bits.shape, seed)), dtype=jnp.uint32) for seed in LANES])


def _bits(array: jax.Array) -> jax.Array:
  """The array as uint32; of elements with 8 bytes each half."""
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  width = min(array.dtype.itemsize, 4)
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
  return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _places(shape: tuple[int, ...], seed: int) -> jax.Array:
  """A number for each place of an array, that no pattern of the data is likely to follow."""
  place = jnp.full(shape, seed, jnp.uint32)
  for axis in range(len(shape)):
    place = _mix(place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis))
  return place


def _mix(x: jax.Array) -> jax.Array:
  """The finalizer of MurmurHash3, a bijection of uint32 in which each bit of the input reaches all of the output."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
