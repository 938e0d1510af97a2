"""Initialization and placement."""

import jax
import numpy as np
import pytest
from training_fixtures import spec_of, tiny

from moejax.config import Mesh
from moejax.models.abstract import parameter_name, placement_table


@pytest.fixture(scope="module")
def eight():
  """A state on eight devices."""
  return spec_of(tiny(True, mesh=Mesh(data=2, expert=2, model=2))).init_state(3)


def test_initial_numbers_do_not_depend_on_the_mesh(eight):
  one = spec_of(tiny(True)).init_state(3)
  for mine, other in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
    np.testing.assert_array_equal(mine, other)


def test_parameters_and_moments_are_born_where_the_rules_place_them(eight):
  spec, state = spec_of(tiny(True, mesh=Mesh(data=2, expert=2, model=2))), eight
  for made, planned in zip(jax.tree.leaves(state), jax.tree.leaves(spec.abstract_state), strict=True):
    assert made.sharding.is_equivalent_to(planned.sharding, made.ndim)
  experts = state.parameters["layers"]["blocks"][1]["feed_forward"]["experts"]["w_gate_EDF"]
  assert experts.shape == (1, 8, 32, 16)
  assert {shard.data.shape for shard in experts.addressable_shards} == {(1, 4, 16, 8)}
  moment = state.optimizer[0].mu["layers"]["blocks"][1]["feed_forward"]["experts"]["w_gate_EDF"]
  assert moment.sharding == experts.sharding


def test_the_table_names_every_parameter_with_its_bytes_per_device():
  spec = spec_of(tiny(True, mesh=Mesh(data=2, expert=2, model=2)))
  rows = {name: (shape, spec, size) for name, shape, spec, size in placement_table(spec.model)}
  assert len(rows) == len(jax.tree.leaves(spec.model.parameters))
  shape, spec, size = rows["layers.blocks.1.feed_forward.experts.w_gate_EDF"]
  assert (shape, size) == ("1 x 8 x 32 x 16", 4 * 4 * 16 * 8)
  assert "expert" in spec and "data" in spec and "model" in spec


def test_a_parameter_that_the_mesh_does_not_divide_is_named():
  rules = (*tiny(True).rules, ("head_dim", ("model",)), ("heads", ()), ("kv_heads", ()))
  with pytest.raises(ValueError, match=r"head_dim=4 is not divisible by the 8 shards"):
    spec_of(tiny(True, mesh=Mesh(data=1, model=8), rules=rules))


def test_names_of_parameters_are_dotted_paths():
  paths = [
    parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(spec_of(tiny(False)).model.parameters)
  ]
  assert "layers.blocks.0.attention.w_q_DNH" in paths and "embedding_VD" in paths
