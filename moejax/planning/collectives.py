"""Determines the bytes, mesh axis, links and time of each collective operation.

A ring of n chips, each of which sends in both directions, gathers V bytes in V (n - 1) / n divided by twice the one-way
bandwidth of a link. Rings along several torus dimensions work at the same time. A line, which does not wrap around, has
half the bandwidth. All-to-all is limited by the middle of the longest ring: D bytes per chip take n D divided by eight
times the one-way bandwidth of a link (jax-ml.github.io/scaling-book/sharding).
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from moejax.config.chips import Chip
from moejax.planning.program import Instruction, Program
from moejax.torus import ring_of

HOP_S = 1e-6
"""Latency in seconds of one hop between chips (scaling book: about 1 us)."""

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Place:
  """The position of a device: its chip in the torus, and its slice or switch."""

  coordinates: tuple[int, ...]
  domain: int


@dataclasses.dataclass(frozen=True)
class Network:
  """The devices of a mesh, in the order in which the program numbers them."""

  chip: Chip
  torus: tuple[int, ...]
  """Length of each dimension of a slice. Empty if a switch joins the devices."""
  places: tuple[Place, ...]
  mesh: dict[str, int]
  """Length of each mesh axis, in order."""

  def axis(self, group: Sequence[int]) -> str:
    """The mesh axes along which the devices of a group differ, as in `data+expert`."""
    coordinates = np.array(np.unravel_index(np.array(group), tuple(self.mesh.values())))
    names = [name for name, of_axis in zip(self.mesh, coordinates, strict=True) if len(set(of_axis.tolist())) > 1]
    return "+".join(names)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of the program."""

  kind: str
  axis: str
  devices: int
  bytes: int
  """Bytes of the whole result on a device (gather, all-to-all) or of the whole operand (reduce)."""
  bandwidth: float
  """Bytes per second that a chip moves."""
  time_s: float
  """Seconds if no other collective uses its links."""
  links: frozenset[str]
  """The torus dimensions that it uses, or the switch or network."""


def collective(network: Network, program: Program, instruction: Instruction) -> Collective | None:
  """Returns the collective of an instruction or inside a fusion, or None if it moves nothing between devices."""
  if instruction.opcode == "send":
    return _between_slices(network, instruction)
  found = _found(program, instruction)
  if found is None or _kind(found) is None:
    return None
  kind, size = collective_kind(program, instruction) or "", _bytes(found)
  groups = _groups(found.attributes, len(network.places))
  if kind == "reduce-scatter" and found.opcode.startswith("reduce-scatter"):
    size *= len(groups[0])
  # A permute lasts as long as its longest way.
  group = max(groups, key=lambda one: transfer(network, kind, one, size)[0])
  time_s, bandwidth = transfer(network, kind, group, size)
  if directions := found.attributes.count('"phase_rings"'):
    # SparseCore: the compiler names the rings, and each direction of one keeps one link busy.
    all_links, bandwidth = bandwidth, min(bandwidth, directions * network.chip.link_bandwidth)
    time_s *= all_links / bandwidth
  return Collective(kind, network.axis(group), len(group), size, bandwidth, time_s, _links(network, group))


def collective_kind(program: Program, instruction: Instruction) -> str | None:
  """The kind of the collective that an instruction is, starts, ends or contains, or None if there is none."""
  if between_slices := _transfer_type(instruction):
    return between_slices
  found = _found(program, instruction)
  if found is None:
    return None
  kind = _kind(found)
  if kind == "all-reduce" and found is not instruction and instruction.bytes * 2 <= _bytes(found):
    return "reduce-scatter"  # TPU: an all-reduce and the slice of it that is kept, in one fusion
  ended = found.opcode.removesuffix("-done")
  return ended if ended in KINDS else kind


def _found(program: Program, instruction: Instruction) -> Instruction | None:
  """The collective in a fusion, or the instruction itself if it is no fusion."""
  inner = program.inner(instruction)
  return instruction if inner is None else next((i for i in inner.instructions if _kind(i)), None)


def _transfer_type(instruction: Instruction) -> str | None:
  """The kind of a collective between slices, of the instructions that send and receive. None for other ones."""
  found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
  return found[1].lower().replace("_", "-") if found else None


def rendezvous(instruction: Instruction) -> str | None:
  """The name that both ends of a transfer between slices share. None for any other instruction."""
  found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes)
  return found[1] if found else None


def transfer(network: Network, kind: str, group: Sequence[int], size: int) -> tuple[float, float]:
  """Seconds, and bytes per second, of one collective over a group of devices."""
  if len(group) < 2 or not size:
    return 0.0, network.chip.link_bandwidth
  places = [network.places[i] for i in group]
  near = [place for place in places if place.domain == places[0].domain]
  domains = len({place.domain for place in places})
  passes = 2 if kind == "all-reduce" else 1
  seconds = hops = 0.0
  rate = network.chip.link_bandwidth
  if len(near) > 1:
    seconds, hops, rate = _inside_domain(network, kind, near, size * passes)
  if domains > 1:
    # Within a domain, each chip first gets its own part. All chips of the domain then send their parts concurrently.
    crossing = size if kind == "collective-permute" else passes * size * (domains - 1) / domains
    crossing = crossing if kind in ("all-to-all", "ragged-all-to-all", "collective-permute") else crossing / len(near)
    seconds += crossing / network.chip.dcn_bandwidth
    rate = network.chip.dcn_bandwidth
  return seconds + hops * HOP_S, rate


def _between_slices(network: Network, instruction: Instruction) -> Collective | None:
  """The part of a collective that crosses slices: each chip sends its data through the host to its peers."""
  kind, size = _transfer_type(instruction), instruction.shapes[0].bytes
  if kind is None:
    return None
  firsts = {place.domain: number for number, place in reversed(list(enumerate(network.places)))}
  group = sorted(firsts.values())
  seconds, rate = transfer(network, kind, group, size)
  return Collective(kind, network.axis(group), len(group), size, rate, seconds, _links(network, group))


def _inside_domain(network: Network, kind: str, places: list[Place], size: int) -> tuple[float, float, float]:
  """Seconds, hops and bytes per second if links or one switch join all devices of the group."""
  chip, count = network.chip, len(places)
  if not network.torus:
    crossing = 1.0 if kind == "collective-permute" else (count - 1) / count
    return size * crossing / chip.link_bandwidth, 1.0, chip.link_bandwidth
  coordinates = zip(*(place.coordinates for place in places), strict=True)
  lengths = zip(coordinates, network.torus, strict=False)  # a chip of a flat torus has a third coordinate, always 0
  rings = [ring for of, length in lengths if (ring := ring_of(of, length, chip.wrap))]
  if not rings:  # cores of one chip: they share its memory
    return size * (count - 1) / count / chip.hbm_bandwidth, 0.0, chip.hbm_bandwidth
  hops = sum(ring.devices / 2 if ring.closed else ring.devices - 1 for ring in rings)
  if kind in ("all-to-all", "ragged-all-to-all"):
    seconds = max(ring.devices * size / (4 * ring.links * chip.link_bandwidth) for ring in rings)
    return seconds, hops, size / seconds
  if kind == "collective-permute":
    one_way = chip.link_bandwidth / sum(ring.stride for ring in rings)
    return size / one_way, 1.0, one_way
  rate = sum(ring.links for ring in rings) * chip.link_bandwidth
  return size * (count - 1) / count / rate, hops, rate


def _links(network: Network, group: Sequence[int]) -> frozenset[str]:
  places = [network.places[i] for i in group]
  near = [place.coordinates for place in places if place.domain == places[0].domain]
  crossed = {f"dimension {at}" for at, of in enumerate(zip(*near, strict=True)) if len(set(of)) > 1}
  inside = crossed if network.torus else {"switch"} if len(near) > 1 else set()
  return frozenset(inside | ({"network"} if len(near) < len(places) else set()))


def _kind(instruction: Instruction) -> str | None:
  stem = instruction.opcode.removesuffix("-start")
  return stem if stem in KINDS else None


def _bytes(instruction: Instruction) -> int:
  """Bytes of the whole result. The result of a `-start` instruction also contains its operands, which come first."""
  shapes, operands = instruction.shapes, len(instruction.operands)
  if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
    shapes = shapes[operands : 2 * operands]
  return sum(shape.bytes for shape in shapes)


def _groups(attributes: str, devices: int) -> list[list[int]]:
  """The pairs of a permute, of which one may be a device and itself. Of other collectives one group of participating
  devices: the other groups have the same shape."""
  pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
  if pairs:
    return [sorted({int(sender), int(to)}) for sender, to in re.findall(r"(\d+),(\d+)", pairs[1])]
  return [_group(attributes, devices)]


def _group(attributes: str, devices: int) -> list[int]:
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?[^)]*)\))? ?\{([^}]*)\}", attributes)
  if mesh:
    return _mesh_group(mesh[1], mesh[2], mesh[3])
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
  if iota:
    return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))[0].tolist()
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
  return _numbers(listed[1]) if listed and listed[1] else list(range(devices))


def _mesh_group(axes: str, order: str | None, used: str) -> list[int]:
  """As printed `mesh['a'=8,'b'=4], device_ids=([4,8]T(1,0)) {'a','b':(1)2}`: the devices of a mesh along some axes."""
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
  iota = re.match(r"\[([\d,]+)\](?:T\(([\d,]+))?", order) if order else None
  devices = _iota(iota[1], iota[2]) if iota else np.arange(math.prod(sizes.values()))
  devices = devices.reshape(tuple(sizes.values()))
  taken = []
  for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", used):
    after = sizes[name] // (int(before) * int(size)) if size else 1
    taken.append((name, int(size) if size else sizes[name], after))
  index = [np.zeros(1, int) for _ in sizes]
  for name, size, after in taken:
    position = list(sizes).index(name)
    steps = np.arange(size) * after
    index = [np.repeat(at, size) for at in index]
    index[position] = index[position] + np.tile(steps, len(index[position]) // size)
  return devices[tuple(index)].tolist()


def _iota(shape: str, transposed: str | None) -> np.ndarray:
  devices = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return (devices.transpose(_numbers(transposed)) if transposed else devices).reshape(-1)


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",")]
