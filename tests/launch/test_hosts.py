"""Topologies as hosts: their number, their chips, and what cannot be rented."""

import itertools

import pytest

from moejax.errors import UserError
from moejax.launch.hosts import PRODUCTS, SMALL_TORUS, SQUARES, hosts_of


@pytest.mark.parametrize(
  ("name", "slices", "count", "chips", "machine"),
  [
    ("v4:4x4x8", 1, 32, 4, "ct4p-hightpu-4t"),
    ("v4:8x4x4", 1, 32, 4, "ct4p-hightpu-4t"),
    ("v5e:1x1", 1, 1, 1, "ct5lp-hightpu-1t"),
    ("v5e:2x2", 1, 1, 4, "ct5lp-hightpu-4t"),
    ("v5e:2x4", 1, 1, 8, "ct5lp-hightpu-8t"),
    ("v5e:16x16", 2, 128, 4, "ct5lp-hightpu-4t"),
    ("v5p:2x2x1", 1, 1, 4, "ct5p-hightpu-4t"),
    ("v5p:4x4x4", 2, 32, 4, "ct5p-hightpu-4t"),
    ("v6e:2x4", 1, 1, 8, "ct6e-standard-8t"),
    ("v6e:8x16", 1, 32, 4, "ct6e-standard-4t"),
    ("tpu7x:1x1x1", 1, 1, 1, "tpu7x-standard-1t"),
    ("tpu7x:4x4x8", 1, 32, 4, "tpu7x-standard-4t"),
    ("gpu:h100:2", 1, 1, 2, "a3-highgpu-2g"),
    ("gpu:h100:16", 1, 2, 8, "a3-highgpu-8g"),
    ("gpu:h200:8", 3, 3, 8, "a3-ultragpu-8g"),
  ],
)
def test_hosts_of_a_topology(name, slices, count, chips, machine):
  hosts = hosts_of(name, slices)
  assert (hosts.count, hosts.chips, hosts.machine) == (count, chips, machine)


def test_the_chips_of_all_hosts_are_those_of_the_topology():
  cubes = itertools.combinations_with_replacement((4, 8, 12, 16), 3)
  torus = ["x".join(map(str, shape)) for shape in (*SMALL_TORUS, *cubes)]
  square = ["x".join(map(str, shape)) for shape in SQUARES]
  names = [f"{chip}:{shape}" for chip in ("v4", "v5p", "tpu7x") for shape in torus]
  names += [f"{chip}:{shape}" for chip in ("v5e", "v6e") for shape in square]
  names += [f"gpu:{chip}:{8 * nodes}" for chip in ("a100", "h100", "h200", "b200") for nodes in range(1, 6)]
  for name in names:
    hosts = hosts_of(name)
    assert hosts.count * hosts.chips == hosts.topology.count, name
    assert hosts.chips in PRODUCTS[hosts.topology.chip.name].sizes, name
  assert {name.split(":")[-2] for name in names} == set(PRODUCTS)


@pytest.mark.parametrize(
  ("name", "slices", "message"),
  [
    ("v5p:8x4x4", 1, "no v5p slice of shape 8x4x4.*A <= B <= C; 128 chips are 4x4x8"),
    ("v5p:2x2x8", 1, "no v5p slice of shape 2x2x8.*; 32 chips are 2x4x4"),
    ("v6e:4x2", 1, "no v6e slice of shape 4x2.*; 8 chips are 2x4"),
    ("v6e:3x5", 1, "no v6e slice of shape 3x5: topologies are 1x1, 2x2, .*16x16$"),
    ("v5e:2x4", 2, "slices=2 of 'v5e:2x4' have one host each.*--slices 1"),
    ("gpu:h100:12", 1, "has 12 GPUs, but hosts have 1 or 2 or 4 or 8.*a multiple of 8"),
    ("gpu:h200:4", 1, "has 4 GPUs, but hosts have 8.*a multiple of 8"),
    ("cpu:8", 1, "'cpu:8' is not available; use one of a100, "),
    ("v9:4x4", 1, "unknown topology 'v9:4x4'"),
  ],
)
def test_what_cannot_be_rented_is_refused_with_what_can(name, slices, message):
  with pytest.raises(UserError, match=message):
    hosts_of(name, slices)
