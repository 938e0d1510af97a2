"""Saves checkpoints of a small state, as a process of several: `saving.py DIRECTORY FAULTS`.

FAULTS is a JSON list with an entry for each save: the numbers of the processes that cannot write long files then.
"""

import json
import pathlib
import resource
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moejax import api, processes
from moejax.config import Checkpoints
from moejax.training.checkpoint import Checkpointer
from moejax.training.state import State


def state_of(step: int, mesh: jax.sharding.Mesh) -> State:
  """An array that is sharded over all devices, and one that each has whole."""
  values = np.random.default_rng(step).standard_normal((8, 5000)).astype(np.float32)
  sharded, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

  def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return State(place(np.int32(step), whole), {"sharded": place(values, sharded), "whole": place(values[0], whole)}, ())


def main(directory: pathlib.Path, faults: list[list[int]]) -> None:
  api.join()
  mesh = jax.sharding.Mesh(jax.devices(), ("data",))
  # An earlier run of the same program, such as another member of a comparison, all of whose checkpoints are written.
  earlier = Checkpointer(directory.with_name("earlier"), Checkpoints(every=1))
  for step in range(1, len(faults) + 1):
    earlier.save(state_of(step, mesh), step, {"data": {}, "step": step})
  earlier.close()
  told: list[str] = []
  checkpointer = Checkpointer(directory, Checkpoints(every=1, keep_last=2), told.append)
  finished = []
  for step, failing in enumerate(faults, 1):
    limit = 10_000 if processes.index() in failing else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    checkpointer.save(state_of(step, mesh), step, {"data": {}, "step": step})
    finished.append(checkpointer.finished())
  resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
  newest = finished[-1]
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(newest, mesh))
  found = checkpointer.restore_newest(abstract, told.append)
  assert found
  for mine, saved in zip(jax.tree.leaves(found[1]), jax.tree.leaves(state_of(newest, mesh)), strict=True):
    for one, other in zip(mine.addressable_shards, saved.addressable_shards, strict=True):
      np.testing.assert_array_equal(one.data, other.data)
  checkpointer.close()
  print(json.dumps({"finished": finished, "told": told, "restored": found[0]}), flush=True)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))
