"""Arranges the axes of a mesh on a torus of chips, so that they share as few links as possible.

If possible, JAX assigns whole dimensions of the torus to an axis. Otherwise, as for data=4 and expert=64 on v6e:16x16,
it assigns chips that are four apart to data, so that four such rings share every link. A block of two by two neighbors
moves the same bytes four times as fast.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from moejax.config.chips import chip_of

WORTH = 0.8
"""Another arrangement is used if its gathers take at most this fraction of the time in that of JAX."""


@dataclasses.dataclass(frozen=True)
class Ring:
  """The part of a torus dimension that an axis uses: `devices` chips, `stride` apart."""

  devices: int
  stride: int
  closed: bool

  @property
  def links(self) -> float:
    """The links that a gather uses: both directions of a ring or one of a line, shared with the chips in between."""
    return (2 if self.closed else 1) / self.stride


def make_ring(devices: int, stride: int, length: int, wrap: int) -> Ring:
  """A ring in a dimension of `length` chips, which wraps around if its length is a multiple of `wrap`."""
  if devices == 2 and length % wrap == 0:
    stride = min(stride, length - stride)  # the shorter way round
  return Ring(devices, stride, devices * stride == length and length % wrap == 0 and length > 2)


def ring_of(coordinates: Iterable[int], length: int, wrap: int) -> Ring | None:
  """The ring through chips at these coordinates of a dimension. None if they are all equal."""
  places = sorted(set(coordinates))
  if len(places) == 1:
    return None
  return make_ring(len(places), math.gcd(*(b - a for a, b in itertools.pairwise(places))), length, wrap)


def arrange(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
  """Arranges the devices in an array of this shape. Slices, which only the data-center network connects, lie along the
  first axis or, if that has too few devices, along the axes after it.

  Within a slice, uses the arrangement of JAX, unless another one gathers much faster on the torus (`WORTH`).

  Args:
    devices: all devices of the mesh.
    shape: sizes of the mesh axes. The first axis holds replicas. It moves only the gradient shards that remain after
      the other axes are reduced, so that its time counts correspondingly less.
  """
  slices = [
    [device for device in devices if slice_of(device) == number] for number in sorted({*map(slice_of, devices)})
  ]
  outer = across_slices(shape, len(slices))
  if outer is not None and len({*map(len, slices)}) == 1 and len(slices) > 1:
    inner = tuple(size // part for size, part in zip(shape, outer, strict=True))
    whole = np.empty(shape, object)
    for place, part in zip(np.ndindex(*outer), slices, strict=True):
      block = tuple(slice(at * size, (at + 1) * size) for at, size in zip(place, inner, strict=True))
      whole[block] = arrange(part, inner)
    return whole
  usual = mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
  chip, grid = chip_of(devices[0].device_kind), _grid(devices)
  if chip is None or grid is None:
    return usual
  best = min(_layouts(grid.shape, shape), key=lambda layout: gather_seconds(layout.rings(grid.shape, chip.wrap)))
  found = best.place(grid)
  gains = _gather_seconds(found, grid, chip.wrap) < WORTH * _gather_seconds(usual, grid, chip.wrap)
  return found if gains else usual


def slice_of(device: jax.Device) -> int:
  """The slice, or on GPUs the node, that a device is in."""
  return getattr(device, "slice_index", None) or 0


def across_slices(shape: tuple[int, ...], slices: int) -> tuple[int, ...] | None:
  """The number of parts into which slices divide each axis, beginning with the first, or None if they cannot."""
  parts = []
  for size in shape:
    parts.append(math.gcd(size, slices))
    slices //= parts[-1]
  return tuple(parts) if slices == 1 else None


def networks(mesh: np.ndarray, axes: Sequence[str]) -> str:
  """Describes the network that each mesh axis uses, for logs. Empty if there is a single process."""
  if len({device.process_index for device in mesh.flat}) == 1 and len({*map(slice_of, mesh.flat)}) == 1:
    return ""

  def crosses(axis: int, place: Callable[[jax.Device], int]) -> bool:
    lines = np.moveaxis(mesh, axis, -1).reshape(-1, mesh.shape[axis])
    return any(len({place(device) for device in line}) > 1 for line in lines)

  def network(axis: int) -> str:
    if crosses(axis, slice_of):
      return "across slices, over the data-center network"
    return "across processes" if crosses(axis, lambda device: device.process_index) else "within a process"

  used = [axis for axis in range(mesh.ndim) if mesh.shape[axis] > 1]
  return "; ".join(f"{axes[axis]} {mesh.shape[axis]} {network(axis)}" for axis in used)


@dataclasses.dataclass(frozen=True)
class Layout:
  """The part of each torus dimension that each mesh axis uses, and the nesting order of the axes."""

  factors: tuple[tuple[int, ...], ...]
  """Number of devices, by [dimension][axis]."""
  order: tuple[int, ...]
  """The axes, from the outermost to the innermost."""

  def rings(self, torus: tuple[int, ...], wrap: int) -> list[list[Ring]]:
    """The rings of each axis."""

    def of_axis(axis: int) -> list[Ring]:
      inner = self.order[self.order.index(axis) + 1 :]
      return [
        make_ring(parts[axis], math.prod(parts[other] for other in inner), length, wrap)
        for parts, length in zip(self.factors, torus, strict=True)
        if parts[axis] > 1
      ]

    return [of_axis(axis) for axis in range(len(self.order))]

  def place(self, grid: np.ndarray) -> np.ndarray:
    """Reshapes an array of devices from the shape of the torus to that of the mesh."""
    axes, dimensions = len(self.order), len(self.factors)
    split = grid.reshape([of[axis] for of in self.factors for axis in self.order])
    where = [dimension * axes + self.order.index(axis) for axis in range(axes) for dimension in range(dimensions)]
    return split.transpose(where).reshape([math.prod(of[axis] for of in self.factors) for axis in range(axes)])


def gather_seconds(axes: list[list[Ring]]) -> float:
  """Seconds of gathers of one byte along each axis over links of 1 byte/s. The first axis is weighted as in
  `arrange`."""
  sizes = [math.prod(ring.devices for ring in rings) for rings in axes]
  seconds = [
    (size - 1) / size / sum(ring.links for ring in rings) if rings else 0.0
    for size, rings in zip(sizes, axes, strict=True)
  ]
  return seconds[0] / math.prod(sizes[1:]) + sum(seconds[1:])


def _layouts(torus: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Layout]:
  used = [axis for axis, size in enumerate(shape) if size > 1]
  for factors in itertools.product(*(list(_factors(length, shape)) for length in torus)):
    if all(math.prod(of[axis] for of in factors) == size for axis, size in enumerate(shape)):
      for order in itertools.permutations(used):
        rest = tuple(axis for axis in range(len(shape)) if axis not in order)
        yield Layout(factors, (*rest, *order))


def _factors(length: int, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
  """The ways to split a torus dimension among the axes."""
  if len(shape) == 1:
    if shape[0] % length == 0:
      yield (length,)
    return
  for part in range(1, math.gcd(length, shape[0]) + 1):
    if length % part == 0 and shape[0] % part == 0:
      for rest in _factors(length // part, shape[1:]):
        yield part, *rest


def _gather_seconds(mesh: np.ndarray, grid: np.ndarray, wrap: int) -> float:
  """`gather_seconds` of devices that are already arranged."""
  at = {device.id: place for place, device in np.ndenumerate(grid)}

  def of_axis(axis: int) -> list[Ring]:
    line = np.moveaxis(mesh, axis, 0).reshape(mesh.shape[axis], -1)[:, 0]
    places = zip(*(at[device.id] for device in line), strict=True)
    rings = [ring_of(of, length, wrap) for of, length in zip(places, grid.shape, strict=True)]
    return [ring for ring in rings if ring is not None]

  return gather_seconds([of_axis(axis) for axis in range(mesh.ndim)])


def _grid(devices: Sequence[jax.Device]) -> np.ndarray | None:
  """The devices by coordinates, or None if they do not form a full torus with one device per chip."""
  places = [tuple(getattr(device, "coords", None) or ()) for device in devices]
  if not places[0] or len(set(places)) != len(devices):
    return None
  low, high = np.min(places, axis=0), np.max(places, axis=0)
  grid = np.empty(high - low + 1, dtype=object)
  if grid.size != len(devices):
    return None
  for device, place in zip(devices, places, strict=True):
    grid[tuple(np.array(place) - low)] = device
  return grid.reshape([length for length in grid.shape if length > 1] or [1])
