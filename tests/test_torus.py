"""Meshes on a torus, worked out by hand: which chips an axis joins, and how fast it gathers."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from moejax import torus
from moejax.torus import Layout, Ring, arrange, gather_seconds, make_ring


@dataclasses.dataclass(frozen=True)
class Described:
  """What an arrangement reads of a `jax.Device`."""

  id: int
  coords: tuple[int, int, int]
  device_kind: str = "TPU v6 lite"
  platform: str = "tpu"
  slice_index: int = 0
  process_index: int = 0


def chips(*lengths: int, kind: str = "TPU v6 lite", slice_index: int = 0) -> list[Described]:
  places = itertools.product(*(range(length) for length in reversed(lengths)))
  return [Described(number, (*at[::-1], *(0,) * (3 - len(at))), kind, slice_index=slice_index)
          for number, at in enumerate(places)]  # fmt: skip


@pytest.fixture(autouse=True)
def strided(monkeypatch):
  """JAX's arrangement where it must split a dimension: the outer axis strides. (Its own needs real topologies.)"""

  def usual(shape, devices, allow_split_physical_axes):
    assert allow_split_physical_axes
    return np.array(sorted(devices, key=lambda device: device.coords), dtype=object).reshape(shape)

  monkeypatch.setattr(torus.mesh_utils, "create_device_mesh", usual)


def test_a_ring_closes_only_with_the_whole_of_a_dimension_that_has_the_wrapping_length():
  assert make_ring(16, 1, length=16, wrap=16) == Ring(16, 1, closed=True)
  assert make_ring(4, 4, length=16, wrap=16) == Ring(4, 4, closed=True)
  assert make_ring(4, 1, length=16, wrap=16) == Ring(4, 1, closed=False)
  assert make_ring(8, 1, length=8, wrap=16) == Ring(8, 1, closed=False)
  assert make_ring(2, 12, length=16, wrap=16) == Ring(2, 4, closed=False)  # the shorter way round


def test_rings_that_lie_in_one_another_share_the_links():
  assert Ring(16, 1, closed=True).links == 2
  assert Ring(4, 1, closed=False).links == 1
  assert Ring(4, 4, closed=True).links == 0.5


def test_the_four_chips_that_share_an_expert_are_neighbors_two_by_two():
  mesh = arrange(chips(16, 16), (1, 4, 64, 1))
  assert {device.coords for device in mesh[0, :, 0, 0]} == {(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)}
  assert {device.coords[:2] for device in mesh[0, 0, :, 0]} == set(itertools.product(range(0, 16, 2), range(0, 16, 2)))
  assert len({device.id for device in mesh.flat}) == 256


def test_replicas_leave_the_better_links_to_the_axis_that_shares_weights():
  devices = chips(16, 16)
  assert (arrange(devices, (4, 64, 1, 1)) == torus.mesh_utils.create_device_mesh((4, 64, 1, 1), devices, True)).all()


def test_what_the_layout_predicts_is_what_the_arranged_devices_have():
  grid = torus._grid(chips(16, 16))
  assert grid is not None
  for factors in (((2, 8), (2, 8)), ((4, 4), (1, 16)), ((1, 16), (4, 4))):
    for order in ((0, 1), (1, 0)):
      layout = Layout(factors, order)
      assert torus._gather_seconds(layout.place(grid), grid, 16) == gather_seconds(layout.rings((16, 16), 16))


def test_neighbors_gather_four_times_as_fast_as_chips_that_lie_four_apart():
  apart = gather_seconds([[], [make_ring(4, 4, 16, 16)]])
  neighbors = gather_seconds([[], [make_ring(2, 1, 16, 16), make_ring(2, 1, 16, 16)]])
  assert apart == pytest.approx(4 * neighbors)


def test_an_arrangement_that_is_no_slower_stays_as_jax_made_it():
  devices = chips(4, 8, 8, kind="TPU v5")
  assert (arrange(devices, (4, 64, 1, 1)) == torus.mesh_utils.create_device_mesh((4, 64, 1, 1), devices, True)).all()


def test_slices_lie_one_after_the_other_along_the_first_axis():
  devices = [*chips(4, 4, slice_index=1), *chips(4, 4, slice_index=0)]
  mesh = arrange(devices, (4, 8, 1, 1))
  assert {device.slice_index for device in mesh[:2].flat} == {0}
  assert {device.slice_index for device in mesh[2:].flat} == {1}


@pytest.mark.parametrize(
  ("shape", "crossing"),
  [
    ((4, 8, 1, 1), {"replica"}),
    ((8, 2, 2, 2), {"replica"}),
    ((2, 8, 4, 1), {"replica", "data"}),
    ((1, 32, 2, 1), {"data"}),
    ((1, 1, 4, 16), {"expert"}),
  ],
)
def test_slices_cross_the_first_axes_and_every_other_axis_stays_within_one(shape, crossing):
  devices = [chip for number in (2, 0, 3, 1) for chip in chips(4, 4, slice_index=number)][: math.prod(shape)]
  mesh = arrange(devices, shape)
  assert len({*mesh.flat}) == len(devices)
  axes = ("replica", "data", "expert", "model")
  networks = dict(zip([axes[i] for i in range(4) if shape[i] > 1], torus.networks(mesh, axes).split("; "), strict=True))
  assert {axis for axis, text in networks.items() if "across slices" in text} == crossing
  for axis in range(4):  # neighbours along an axis that crosses lie in one slice until its part there is used up
    line = [device.slice_index for device in np.moveaxis(mesh, axis, -1).reshape(-1, shape[axis])[0]]
    assert sorted(line) == line


@pytest.mark.parametrize(
  "devices", [chips(16, 16)[:200], [dataclasses.replace(chip, device_kind="TPU v9") for chip in chips(4, 4)]]
)
def test_chips_that_are_no_whole_torus_or_not_known_stay_as_jax_arranges_them(devices):
  mesh = arrange(devices, (len(devices) // 4, 4))
  assert mesh.shape == (len(devices) // 4, 4)
