"""Checksums of arrays, which are computed on the devices and do not depend on the mesh.

Each element is hashed together with its position in the global array, and the hashes are summed modulo 2^32. Since an
integer sum does not depend on the order, the result is the same for every mesh and number of processes, and arrays need
not be gathered or copied. For each position, the hash is a bijection of the element, so that a change of a single
element is always detected. Other damage is detected with probability 1 - 2^-64.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moejax.host_memory import to_device

LANES = (0x243F6A88, 0x85A308D3)
"""Seeds of two independent sums, from the digits of pi."""


def checksums(tree: Any) -> dict[str, str]:
  """Checksums (16 hexadecimal digits) of the arrays of a tree, by path."""

  def checksum(leaf: jax.Array) -> str:
    # Wait for each: simulated devices on few cores may deadlock if many programs with collectives run at once.
    lanes = jax.device_get(_sum_of_hashes(leaf.sharding)(leaf))
    return np.asarray(lanes, ">u4").tobytes().hex()

  return {array_name(path): checksum(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def array_name(path: Iterable[Any]) -> str:
  """`parameters.embedding.w_VD` from a tree path."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator=".")


@functools.cache
def _sum_of_hashes(sharding: NamedSharding) -> jax.stages.Wrapped:
  """The compiled checksum function for arrays with this sharding. All processes get the result."""
  return jax.jit(_lanes, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))


def _lanes(array: jax.Array) -> jax.Array:
  """uint32 [2]."""
  bits = _bits(to_device(array))
  return jnp.stack([jnp.sum(_mix(bits ^ _places(bits.shape, seed)), dtype=jnp.uint32) for seed in LANES])


def _bits(array: jax.Array) -> jax.Array:
  """The bits of an array as uint32. Elements of 8 bytes are split into two halves."""
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  width = min(array.dtype.itemsize, 4)
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
  return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _places(shape: tuple[int, ...], seed: int) -> jax.Array:
  """A pseudorandom number for each position of an array."""
  place = jnp.full(shape, seed, jnp.uint32)
  for axis in range(len(shape)):
    place = _mix(place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis))
  return place


def _mix(x: jax.Array) -> jax.Array:
  """The finalizer of MurmurHash3, a bijection of uint32 in which each bit of the input reaches all of the output."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
