"""The devices of a topology as described to the compiler, and the network that connects them."""

from collections.abc import Sequence
from importlib import metadata

import jax
from jax.experimental import topologies

from moejax.config.chips import Chip
from moejax.config.sharding import Mesh
from moejax.errors import UserError
from moejax.planning import gpu_target
from moejax.planning.collectives import Network, Place
from moejax.planning.topology import EXAMPLES, Topology


def describe_devices(topology: Topology) -> list[jax.Device]:
  """The devices of a topology: descriptions to compile for, or simulated CPU devices of this machine.

  Raises:
    UserError: If the compiler is not installed or does not support the shape.
  """
  if topology.chip.platform == "gpu":
    return _describe_gpus(topology)
  if topology.chip.platform == "cpu":
    devices = jax.devices("cpu")
    if len(devices) < topology.devices:
      raise UserError(
        f"topology {topology.name} needs {topology.devices} simulated devices, but JAX has {len(devices)}; run it in a "
        "new process"
      )
    return devices[: topology.devices]
  shape = "x".join(map(str, topology.torus))
  options: dict = {"num_slices": topology.slices} if topology.slices > 1 else {}
  if topology.chip.name == "v4":  # both cores of a chip as one device, as on a real v4
    options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
  try:
    described = topologies.get_topology_desc(topology_name=f"{topology.chip.name}:{shape}", platform="tpu", **options)
  except Exception as error:  # libtpu's own classes
    raise UserError(_why(topology, str(error))) from error
  return list(described.devices)


def _describe_gpus(topology: Topology) -> list[jax.Device]:
  """Describes GPUs in nodes, each of which is an NVLink domain, or in a part of a node."""
  node = min(topology.count, topology.chip.domain or topology.count)
  if topology.count % node:
    raise UserError(
      f"topology {topology.name} has {topology.count} GPUs, which is not a multiple of the {node} GPUs of a node; use "
      f"a multiple of {node}"
    )
  shape = f"{topology.slices}x{topology.count // node}x{node}"
  try:
    described = topologies.get_topology_desc(
      platform="cuda", topology=shape, target_config=gpu_target.describe(topology.chip.name)
    )
  except Exception as error:  # the plugin's own classes, and JAX's where there is no plugin
    raise UserError(_why_no_gpu(topology, str(error))) from error
  return list(described.devices)


def network(topology: Topology, mesh: jax.sharding.Mesh, shape: Mesh) -> Network:
  """The position of each device of a mesh, in the order of their numbers in a compiled program."""
  places = []
  for number, device in enumerate(mesh.devices.flat):
    if topology.torus:
      places.append(Place(tuple(device.coords), getattr(device, "slice_index", None) or 0))
    else:
      places.append(Place((number,), number // topology.chip.domain if topology.chip.domain else 0))
  return Network(topology.chip, topology.torus, tuple(places), shape.shape)


def present_torus(chip: Chip, devices: Sequence[jax.Device]) -> tuple[int, ...]:
  """Length of each dimension of the torus that devices of a slice span. Empty if a switch connects them."""
  if not chip.torus:
    return ()
  dimensions = list(zip(*(device.coords for device in devices), strict=True))[: chip.torus]
  return tuple(max(of) - min(of) + 1 for of in dimensions)


def _why_no_gpu(topology: Topology, message: str) -> str:
  version = metadata.version("jax")
  pip = f'pip install "moejax[gpu-plan]" or pip install jax-cuda12-plugin=={version}'
  if not any(_installed(f"jax-cuda{cuda}-plugin") for cuda in (12, 13)):
    return f"topology {topology.name} needs XLA's compiler for NVIDIA GPUs, which is not installed; {pip} installs it"
  first = message.strip().splitlines()[0][:200] if message.strip() else "no reason given"
  return f"XLA does not describe {topology.name}: {first}; jax {version} and its CUDA plugin must agree: {pip}"


def _installed(package: str) -> bool:
  try:
    metadata.version(package)
  except metadata.PackageNotFoundError:
    return False
  return True


def _why(topology: Topology, message: str) -> str:
  pip = 'pip install --upgrade "jax[tpu]"'
  try:
    version = metadata.version("libtpu")
  except metadata.PackageNotFoundError:
    return f"topology {topology.name} needs the compiler of TPU, libtpu, which is not installed; {pip} installs it"
  first = message.strip().splitlines()[0][:200] if message.strip() else "no reason given"
  return f"libtpu {version} does not describe {topology.name}: {first}; try another shape, as in {EXAMPLES}, or {pip}"
