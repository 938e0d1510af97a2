"""Plans at several router loads: the busiest device of a dropless layer, and what a capacity drops."""

from dataclasses import replace

import numpy as np
import pytest

from moejax.config import Mesh
from moejax.config.fields import with_fields
from moejax.errors import UserError
from moejax.planning import load as loads
from moejax.planning.load import dropped_fraction, plan_loads
from moejax.planning.topology import parse_topology

CPU = parse_topology("cpu:8")


@pytest.fixture
def capacity(tiny_moe):
  return with_fields(
    tiny_moe, {"model.moe.dispatch": "einsum", "model.moe.num_experts": 64, "model.moe.group_size": 32}
  )


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 2.0])
def test_a_capacity_drops_what_evenly_spread_loads_have_above_it(capacity, factor):
  """Against a sum over many experts."""
  experiment = with_fields(capacity, {"model.moe.capacity_factor": factor})
  moe, tokens = experiment.model.moe, 32
  room = moe.capacity(tokens) * moe.num_experts / (moe.experts_per_token * tokens)
  for largest in (1.0, 1.2, 1.5, 2.0, 3.0, 6.0):
    busy = np.linspace(max(0.0, 2 - largest), largest, 100_001)
    share = min(1.0, 2 / largest)  # of the experts that are not idle
    expected = share * np.maximum(0.0, busy - room).mean()
    assert dropped_fraction(experiment, str(largest)) == pytest.approx(expected, abs=1e-4)
  fractions = [dropped_fraction(experiment, load) for load in ("1.0", "1.5", "2.0", "4.0", "worst")]
  assert fractions == sorted(fractions) and fractions[-1] < 1


def test_a_dropless_layer_is_planned_with_a_buffer_of_each_load(tiny_moe, monkeypatch):
  experiment = replace(with_fields(tiny_moe, {"model.moe.dispatch": "grouped"}), mesh=Mesh(data=4, expert=2))
  monkeypatch.setattr(loads, "plan", lambda changed, *_: changed)
  found = plan_loads(experiment, CPU, ["1.0", "1.5", "worst"])
  assert [one.plan.model.moe.dispatch.receive_factor for one in found] == [1.0, 1.5, None]
  assert {one.dropped_fraction for one in found} == {0.0}


@pytest.mark.parametrize(
  ("load", "mesh", "said"),
  [
    ("0.5", Mesh(data=4, expert=2), "at least 1"),
    ("nan", Mesh(data=4, expert=2), "at least 1"),
    ("much", Mesh(data=4, expert=2), "at least 1"),
    ("1.5", Mesh(data=8), "raise mesh.expert"),
  ],
)
def test_a_load_that_is_none_or_has_no_effect_is_refused(load, mesh, said, tiny_moe):
  experiment = replace(with_fields(tiny_moe, {"model.moe.dispatch": "grouped"}), mesh=mesh)
  with pytest.raises(UserError, match=said):
    plan_loads(experiment, CPU, [load])


def test_a_dense_model_has_no_load(tiny_dense):
  with pytest.raises(UserError, match="requires sparse layers"):
    plan_loads(tiny_dense, CPU, ["1.5"])
