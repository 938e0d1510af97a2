"""Meshes that use every device of a topology. Does not import JAX."""

import dataclasses
import functools
import math
from collections.abc import Iterator

from moejax.config.experiment import Experiment
from moejax.config.precision import check_chip
from moejax.config.sharding import MESH_AXES, Mesh
from moejax.errors import UserError
from moejax.planning.topology import Topology


def on_topology(experiment: Experiment, topology: Topology) -> Experiment:
  """Completes the mesh of an experiment for a topology.

  Raises:
    UserError: If the mesh does not use every device, its replica axis does not match the slices, or tensors are not
      divisible by it: the message suggests the nearest valid mesh, if there is one. If the chip lacks 8-bit products
      of the model.
  """
  check_chip(experiment.model.precision, topology.chip)
  mesh, devices = experiment.mesh, topology.devices
  others = mesh.replica * mesh.expert * mesh.context * mesh.model
  if others * (mesh.data or 1) != devices and (mesh.data is not None or devices % others):
    raise UserError(
      f"mesh ({mesh}) does not tile the {devices} devices of {topology.name}; {_advice(experiment, topology)}"
    )
  if mesh.replica % topology.slices:
    raise UserError(
      f"mesh.replica={mesh.replica} does not match the {topology.slices} slices of {topology.name}; "
      f"{_advice(experiment, topology)}"
    )
  try:
    return dataclasses.replace(experiment, mesh=mesh.resolve(devices))
  except UserError as error:
    raise UserError(f"{error}; on {topology.name}, {_advice(experiment, topology)}") from error


def meshes(topology: Topology, num_experts: int, largest_model_axis: int, context: int = 1) -> Iterator[Mesh]:
  """All meshes that use every device of a topology and whose expert axis divides the number of experts."""
  devices, rest = divmod(topology.devices, context)
  for model in () if rest else _divisors(devices):
    if model > largest_model_axis:
      continue
    for expert in _divisors(devices // model):
      if num_experts % expert:
        continue
      rest = devices // (model * expert)
      for replica in _divisors(rest):
        if replica % topology.slices == 0:
          yield Mesh(replica=replica, data=rest // replica, expert=expert, context=context, model=model)


def mesh_options(before: Mesh, after: Mesh) -> list[str]:
  """The command-line options that change one mesh into another."""
  return [f"--mesh.{axis} {getattr(after, axis)}" for axis in MESH_AXES
          if getattr(after, axis) != getattr(before, axis)]  # fmt: skip


def _advice(experiment: Experiment, topology: Topology) -> str:
  """Suggests the nearest valid mesh: the one with the fewest changed axes, then with the smallest changes."""
  now = experiment.mesh
  num_experts = experiment.model.moe.num_experts if experiment.model.moe else 1

  def changes(mesh: Mesh) -> tuple[int, float]:
    factors = [max(a, b) / min(a, b) for a, b in zip(mesh.shape.values(), now.shape.values(), strict=True)]
    return len(mesh_options(now, mesh)), sum(factors)

  for mesh in sorted(meshes(topology, num_experts, topology.devices, now.context), key=changes):
    try:
      dataclasses.replace(experiment, mesh=mesh)
    except UserError:
      continue
    return f"use {' '.join(mesh_options(now, mesh))}"
  return (
    f"no mesh of {topology.devices} devices is valid for a batch of {experiment.training.batch_size} sequences in "
    f"{experiment.training.gradient_accumulation} microbatches, an evaluation batch of "
    f"{experiment.evaluation.batch_size} sequences and the widths of the model; change the batch sizes or the number "
    "of "
    "chips"
  )


@functools.lru_cache
def _divisors(n: int) -> list[int]:
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return sorted({*small, *(n // d for d in small)})
