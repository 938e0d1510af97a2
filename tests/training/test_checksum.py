"""Checksums are the same on every mesh, and no change of the bits leaves them as they were."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.training.checksum import checksums

TYPES = (np.float32, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_, np.float16)
PLACEMENTS = ((1, 1, None, None), (8, 1, "x", None), (2, 4, "x", "y"), (2, 4, ("x", "y"), None), (4, 2, None, "y"))


def placed(array, rows=1, columns=1, *axes):
  mesh = Mesh(np.array(jax.devices()[: rows * columns]).reshape(rows, columns), ("x", "y"))
  return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))


def checksum(array, *placement):
  return checksums({"array": placed(array, *placement)})["array"]


def of_type(dtype, seed=0):
  chance = np.random.default_rng(seed)
  if dtype == np.bool_:
    return chance.integers(0, 2, (8, 16)).astype(bool)
  return (
    chance.standard_normal((8, 16)).astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating)
    else (chance.integers(0, 200, (8, 16)).astype(dtype))
  )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
def test_a_checksum_is_the_same_on_every_mesh(dtype):
  array = of_type(dtype)
  assert len({checksum(array, *placement) for placement in PLACEMENTS}) == 1


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32])
def test_every_flipped_bit_changes_the_checksum(dtype):
  array, chance = of_type(dtype), np.random.default_rng(1)
  right = checksum(array)
  for _ in range(100):
    damaged = bytearray(array.tobytes())
    damaged[chance.integers(len(damaged))] ^= 1 << chance.integers(8)
    assert checksum(np.frombuffer(damaged, dtype).reshape(array.shape)) != right


def test_what_is_moved_within_an_array_changes_the_checksum():
  array = of_type(np.float32)
  other = [array[::-1], array[:, ::-1], array[[1, 0, *range(2, 8)]], np.roll(array, 1), array.reshape(16, 8)]
  other += [np.zeros_like(array), -np.zeros_like(array), np.zeros_like(array)[:4]]
  found = [checksum(each) for each in [array, *other]]
  assert len(set(found)) == len(found)


def test_scalars_and_arrays_without_elements_have_checksums():
  assert checksum(np.int32(3)) != checksum(np.int32(4))
  first, second = checksum(np.int32(3))[:8], checksum(np.int32(3))[8:]
  assert first != second  # two sums of their own
  assert checksum(np.zeros((0, 4), np.float32))


def test_checksums_are_named_by_their_path():
  tree = {"parameters": {"w": placed(of_type(np.float32))}, "optimizer": (placed(np.int32(3)),)}
  assert set(checksums(tree)) == {"parameters.w", "optimizer.0"}
