"""The hosts of a topology: their number, their chips, and their names in Google Cloud. Imports no JAX.

Sources: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (labels, machine types, topologies),
cloud.google.com/kubernetes-engine/docs/concepts/gpus and cloud.google.com/compute/docs/gpus (GPUs), and
cloud.google.com/tpu/docs/runtimes (software of TPU VMs).
"""

import dataclasses
import itertools
import math

from moejax.errors import UserError
from moejax.planning.topology import Topology, parse_topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
  """The names of a chip in Google Cloud."""

  label: str
  """Value of the node label that names the accelerator."""
  machine: str
  """Machine type of a host; {n} is its number of chips."""
  sizes: tuple[int, ...]
  """Possible numbers of chips of a host that is the only one of its slice or node group. The last one is the number of
  chips of each of several hosts."""
  runtime: str | None = None
  """Software version of TPU VMs, or None if there are no TPU VMs with this chip."""
  vm_type: str | None = None
  """Prefix of the accelerator type."""


PRODUCTS = {
  "v4": Product(
    label="tpu-v4-podslice", machine="ct4p-hightpu-{n}t", sizes=(4,), runtime="tpu-ubuntu2204-base", vm_type="v4"
  ),
  "v5e": Product(
    label="tpu-v5-lite-podslice", machine="ct5lp-hightpu-{n}t", sizes=(1, 8, 4), runtime="v2-alpha-tpuv5-lite",
    vm_type="v5litepod",
  ),
  "v5p": Product(
    label="tpu-v5p-slice", machine="ct5p-hightpu-{n}t", sizes=(4,), runtime="v2-alpha-tpuv5", vm_type="v5p"
  ),
  "v6e": Product(
    label="tpu-v6e-slice", machine="ct6e-standard-{n}t", sizes=(1, 8, 4), runtime="v2-alpha-tpuv6e", vm_type="v6e"
  ),
  "tpu7x": Product(label="tpu7x", machine="tpu7x-standard-{n}t", sizes=(1, 4)),
  "a100": Product(label="nvidia-a100-80gb", machine="a2-ultragpu-{n}g", sizes=(1, 2, 4, 8)),
  "h100": Product(label="nvidia-h100-80gb", machine="a3-highgpu-{n}g", sizes=(1, 2, 4, 8)),
  "h200": Product(label="nvidia-h200-141gb", machine="a3-ultragpu-{n}g", sizes=(8,)),
  "b200": Product(label="nvidia-b200", machine="a4-highgpu-{n}g", sizes=(8,)),
}  # fmt: skip
"""Products by the name that `--topology` uses."""

SMALL_TORUS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
SQUARES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


@dataclasses.dataclass(frozen=True)
class Hosts:
  """The hosts of a job."""

  topology: Topology
  product: Product
  per_slice: int
  """Number of hosts per slice or, for GPUs, of all hosts."""
  chips: int
  """Number of chips per host."""

  @property
  def is_tpu(self) -> bool:
    """Whether the chips are TPUs instead of GPUs."""
    return self.topology.chip.platform == "tpu"

  @property
  def slices(self) -> int:
    """Number of slices. GPUs count as one slice."""
    return self.topology.slices if self.is_tpu else 1

  @property
  def count(self) -> int:
    """Number of hosts. Each host runs one process."""
    return self.per_slice * self.slices

  @property
  def machine(self) -> str:
    """Machine type of a host."""
    return self.product.machine.format(n=self.chips)

  @property
  def shape(self) -> str:
    """The torus as Google Cloud writes it: 4x4x8."""
    return "x".join(map(str, self.topology.torus))


def hosts_of(name: str, slices: int = 1) -> Hosts:
  """The hosts of a topology such as v5p:4x4x8 or gpu:h100:16.

  Raises:
    UserError: If the topology is unknown or not available in Google Cloud.
  """
  topology = parse_topology(name, slices)
  product = PRODUCTS.get(topology.chip.name)
  if product is None:
    raise UserError(f"topology {name!r} is not available; use one of {', '.join(sorted(PRODUCTS))}, as in v5p:4x4x8")
  if topology.chip.platform == "gpu":
    chips = topology.count * topology.slices
    of_host = _chips_of_host(product, chips)
    if of_host is None:
      raise UserError(
        f"topology {name!r} has {chips} GPUs, but hosts have {' or '.join(map(str, product.sizes))}, and only those of "
        f"{product.sizes[-1]} can be joined; use a multiple of {product.sizes[-1]}"
      )
    return Hosts(topology, product, chips // of_host, of_host)
  _check_torus(topology)
  of_host = _chips_of_host(product, topology.count)
  assert of_host is not None, topology
  if slices > 1 and topology.count == of_host:
    raise UserError(
      f"slices={slices} of {name!r} have one host each, but only slices of several hosts can be joined; use a larger "
      "topology or --slices 1"
    )
  return Hosts(topology, product, topology.count // of_host, of_host)


def _chips_of_host(product: Product, chips: int) -> int | None:
  if chips in product.sizes:
    return chips
  return product.sizes[-1] if chips % product.sizes[-1] == 0 else None


def _check_torus(topology: Topology) -> None:
  """Raises UserError if Google Cloud has no slice of this shape."""
  torus, name = topology.torus, topology.chip.name
  if topology.chip.torus == 2:
    known = torus in SQUARES
    hint = "topologies are " + ", ".join("x".join(map(str, shape)) for shape in SQUARES)
  else:
    known = torus in SMALL_TORUS or (torus == (1, 1, 1) and 1 in PRODUCTS[name].sizes)
    known = known or (all(length % 4 == 0 for length in torus) and (name == "v4" or list(torus) == sorted(torus)))
    small = ", ".join("x".join(map(str, shape)) for shape in SMALL_TORUS)
    hint = f"topologies are {small}, and AxBxC of multiples of 4" + ("" if name == "v4" else " with A <= B <= C")
  if not known:
    near = _nearest(topology)
    raise UserError(f"Google Cloud has no {name} slice of shape {'x'.join(map(str, torus))}: {hint}{near}")


def _nearest(topology: Topology) -> str:
  """Suggests a valid shape with the same number of chips."""
  known = SQUARES if topology.chip.torus == 2 else SMALL_TORUS
  shapes: list[tuple[int, ...]] = [shape for shape in known if math.prod(shape) == topology.count]
  if not shapes and topology.chip.torus == 3:
    lengths = [n for n in range(4, topology.count + 1, 4) if topology.count % n == 0]
    cubes = itertools.combinations_with_replacement(lengths, 3)
    shapes += sorted((shape for shape in cubes if math.prod(shape) == topology.count), key=max)[:1]
  return f"; {topology.count} chips are {'x'.join(map(str, shapes[0]))}" if shapes else ""
