"""One process of a program that trains every kind of layer on every kind of mesh: `layouts.py TEXT CORPUS OUT`.

Process 0 leaves in OUT, by experiment and mesh, the losses and the parameters of a few steps and their batches.
"""

import dataclasses
import pathlib
import sys

import jax
import launch_experiments as experiments
import numpy as np
from jax.sharding import NamedSharding

from moejax import api, processes
from moejax.config import Experiment, Mesh
from moejax.config.dispatch import GroupedDispatch
from moejax.data.corpus import build_corpus
from moejax.data.mixture import training_mixture
from moejax.data.pipeline import train_batches
from moejax.data.text import open_text
from moejax.partitioning import make_partitioner, to_devices
from moejax.training.loop import rows_of_process
from moejax.training.state import make_train_spec
from moejax.training.step import make_train_step

STEPS = 3


def cases() -> dict[str, Experiment]:
  """Dense layers and every dispatch, on meshes whose axes lie within a process, and on some where they do not."""
  sparse = experiments.sparse()

  def with_layer(**fields: object) -> Experiment:
    return dataclasses.replace(
      sparse, model=dataclasses.replace(sparse.model, moe=dataclasses.replace(sparse.model.moe, **fields))
    )

  grouped = with_layer(dispatch="grouped", group_size=None)
  layers = {
    "dense": experiments.dense(),
    "einsum": sparse,
    "grouped": grouped,
    "gathered": with_layer(dispatch=GroupedDispatch(exchange="all_gather"), group_size=None),
    "every_expert": with_layer(dispatch="dense", group_size=None),
  }
  everywhere = {"data": Mesh(data=8), "expert": Mesh(data=1, expert=8)}
  of_some = {
    "dense": {"model": Mesh(data=1, model=8), "data_model": Mesh(replica=2, data=2, model=2)},
    "einsum": {"model": Mesh(data=1, model=8), "all": Mesh(data=2, expert=2, model=2)},
    "grouped": {"all": Mesh(data=2, expert=2, model=2), "replica": Mesh(replica=2, data=1, expert=4)},
  }
  return {
    f"{layer}/{name}": dataclasses.replace(experiment, mesh=mesh)
    for layer, experiment in layers.items()
    for name, mesh in (everywhere | of_some.get(layer, {})).items()
  }


def whole(array: jax.Array) -> np.ndarray:
  """A global array on this host."""
  replicated = NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
  return np.asarray(jax.jit(lambda x: x, out_shardings=replicated)(array))


def train(experiment: Experiment, corpus: object) -> dict[str, np.ndarray]:
  spec = make_train_spec(experiment, make_partitioner(experiment.mesh, experiment.rules))
  step, state, local = make_train_step(spec), spec.init_state(0), rows_of_process(spec)
  mixture = training_mixture(corpus, experiment.data)
  batches = train_batches(mixture, experiment.data, experiment.training.batch_size, local.rows)
  found: dict[str, list[np.ndarray]] = {"losses": [], "batches": []}
  for _ in range(STEPS):
    batch = to_devices(next(batches), spec.partitioner.batch, local)
    found["batches"].append(np.stack([whole(batch[name]) for name in ("tokens", "targets", "segments", "positions")]))
    state, metrics = step(state, batch, np.float32(1e-2))
    found["losses"].append(np.asarray(metrics["loss"]))
  parameters = {f"parameters/{i}": whole(leaf) for i, leaf in enumerate(jax.tree.leaves(state.parameters))}
  return {name: np.stack(values) for name, values in found.items()} | parameters


def main(text: str, cache: str, out: str) -> None:
  api.join()
  data = dataclasses.replace(
    experiments.dense().data, train=(f"{text}/train.txt",), validation=(f"{text}/validation.txt",)
  )
  corpus = processes.first_then_all(lambda: build_corpus(open_text(data), pathlib.Path(cache)))
  found = {
    f"{name}/{key}": value
    for name, experiment in cases().items()
    for key, value in train(dataclasses.replace(experiment, data=data), corpus).items()
  }
  if processes.is_first():
    np.savez(out, **found)


if __name__ == "__main__":
  main(*sys.argv[1:])
