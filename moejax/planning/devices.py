"""The devices of a topology, described by the compiler, and how a mesh of them is joined."""

from importlib import metadata

import jax
from jax.experimental import topologies

from moejax.config.sharding import Mesh
from moejax.errors import UserError
from moejax.planning.collectives import Network, Place
from moejax.planning.topology import EXAMPLES, Topology


def describe_devices(topology: Topology) -> list[jax.Device]:
  """The devices of a topology: described ones to compile for, or simulated ones of this machine for GPU and CPU.

  Raises:
    UserError: libtpu is missing or does not know the shape.
  """
  if not topology.torus:
    devices = jax.devices("cpu")
    if len(devices) < topology.devices:
      raise UserError(f"topology {topology.name} needs {topology.devices} simulated devices and JAX has {len(devices)}")
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


def network(topology: Topology, mesh: jax.sharding.Mesh, shape: Mesh) -> Network:
  """Where each device of a mesh is, in the order in which a program compiled for it numbers them."""
  places = []
  for number, device in enumerate(mesh.devices.flat):
    if topology.torus:
      places.append(Place(tuple(device.coords), getattr(device, "slice_index", None) or 0))
    else:
      places.append(Place((number,), number // topology.chip.domain if topology.chip.domain else 0))
  return Network(topology.chip, topology.torus, tuple(places), shape.shape)


def _why(topology: Topology, message: str) -> str:
  pip = 'pip install --upgrade "jax[tpu]"'
  try:
    version = metadata.version("libtpu")
  except metadata.PackageNotFoundError:
    return f"topology {topology.name} needs the compiler of TPU, libtpu, which is not installed; {pip} installs it"
  first = message.strip().splitlines()[0][:200] if message.strip() else "no reason given"
  return f"libtpu {version} does not describe {topology.name}: {first}; try another shape, as in {EXAMPLES}, or {pip}"
