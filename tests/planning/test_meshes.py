"""Meshes that use every device of a topology, and what is advised where one does not."""

import random
import re
from dataclasses import replace

import pytest

from moejax.config import Mesh
from moejax.errors import UserError
from moejax.experiments import EXPERIMENTS
from moejax.overrides import override
from moejax.planning.meshes import meshes, on_topology
from moejax.planning.topology import parse_topology


def test_a_mesh_fills_its_data_axis_with_the_devices_of_the_topology():
  experiment = replace(EXPERIMENTS["moe_6b4_64e"](), mesh=Mesh(expert=8, model=2))
  assert on_topology(experiment, parse_topology("v5p:4x8x8")).mesh == Mesh(data=16, expert=8, model=2)


def test_meshes_use_every_device_once_and_span_the_slices():
  topology = parse_topology("v5p:4x4x4", slices=2)
  found = list(meshes(topology, num_experts=8, largest_model_axis=16))
  assert len(found) == len(set(found)) > 20
  for mesh in found:
    assert mesh.size == 128 and mesh.replica % 2 == 0 and 8 % mesh.expert == 0 and mesh.model <= 16


@pytest.mark.slow
def test_the_mesh_that_is_advised_is_accepted():
  """Whatever mesh, chips, slices and batch: an error names options that make it go away, or says that none do."""
  draw = random.Random(0)
  advised = 0
  for _ in range(300):
    shape = "x".join(str(draw.choice([1, 2, 3, 4, 8])) for _ in range(3))
    topology = parse_topology(f"v5p:{shape}", slices=draw.choice([1, 2, 3, 4]))
    mesh = Mesh(
      replica=draw.choice([1, 1, 2, 3, 4]),
      data=draw.choice([None, 4, 7, 16]),
      expert=draw.choice([1, 2, 8]),
      model=draw.choice([1, 1, 2, 5]),
    )
    base = EXPERIMENTS[draw.choice(["dense_6b4", "moe_6b4_16e"])]()
    try:
      experiment = replace(base, mesh=mesh)
    except UserError:
      continue
    try:
      on_topology(experiment, topology)
    except UserError as error:
      options = re.findall(r"--mesh\.\w+ \d+", str(error))
      if not options:
        assert "no mesh of" in str(error)
        continue
      advised += 1
      changed = override(experiment, [word for option in options for word in option.split()])
      assert on_topology(changed, topology).mesh.size == topology.devices
  assert advised > 30


@pytest.mark.parametrize("slices", [2, 3])
def test_a_replica_axis_that_does_not_span_the_slices_is_refused(slices, tiny_dense):
  topology = parse_topology(f"cpu:{8 // slices}", slices=slices)
  with pytest.raises(UserError, match=rf"mesh\.replica=1 does not match the {slices} slices"):
    on_topology(replace(tiny_dense, mesh=Mesh()), topology)
