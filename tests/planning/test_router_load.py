"""Plans at several router loads: the busiest device of a dropless layer, and what a capacity drops."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from moejax.config import Mesh
from moejax.config.fields import with_fields
from moejax.errors import UserError
from moejax.planning import load as loads
from moejax.planning.collectives import Network, Place
from moejax.planning.cost import Received, cost
from moejax.planning.load import Load, dropped_fraction, plan_loads
from moejax.planning.program import parse
from moejax.planning.topology import parse_topology
from moejax.training.run_directory import run_configuration

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
    assert dropped_fraction(experiment, Load(str(largest), largest)) == pytest.approx(expected, abs=1e-4)
  fractions = [dropped_fraction(experiment, Load(str(load), load)) for load in (1.0, 1.5, 2.0, 4.0)]
  fractions.append(dropped_fraction(experiment, Load("worst", float("inf"))))
  assert fractions == sorted(fractions) and fractions[-1] < 1


def test_a_dropless_layer_is_planned_with_a_buffer_of_each_load(tiny_moe, monkeypatch):
  experiment = replace(with_fields(tiny_moe, {"model.moe.dispatch": "grouped"}), mesh=Mesh(data=4, expert=2))
  monkeypatch.setattr(loads, "plan", lambda changed, *_, load: changed)
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


@pytest.fixture
def trained(capacity, tmp_path):
  """The directory of a run whose busiest expert of 64 has 3 of 64 choices, and then 5."""
  even = [1.0] * 62
  loads = [[[3.0, 0.0, *even]], [[5.0, 0.0, *even]]]
  lines = [{"step": step, "router/load": load * capacity.model.num_sparse_layers} for step, load in enumerate(loads)]
  (tmp_path / "experiment.json").write_text(json.dumps(run_configuration(capacity, 9)))
  (tmp_path / "summary.json").write_text('{"provenance": {"device_kind": "cpu", "device_count": 8}}')
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(tmp_path)


def test_the_load_of_a_run_is_that_of_the_devices_of_the_plan_at_the_end_of_training(capacity, trained, monkeypatch):
  monkeypatch.setattr(loads, "plan", lambda changed, *_, load=None: SimpleNamespace(experiment=changed, load=load))
  dropless = replace(with_fields(capacity, {"model.moe.dispatch": "grouped"}), mesh=Mesh(data=2, expert=4))
  (found,) = plan_loads(dropless, CPU, [trained])
  busiest = (5 + 14) * 4 / 67
  assert found.load.value == found.plan.load == pytest.approx(busiest)
  assert found.plan.experiment.model.moe.dispatch.receive_factor == pytest.approx(busiest)
  (found,) = plan_loads(capacity, CPU, [trained])
  assert found.load.value == pytest.approx(5 * 64 / 67)
  room = capacity.model.moe.capacity(32) / (capacity.model.moe.experts_per_token * 32)
  shares = [5 / 67, *[1 / 67] * 62]
  assert found.dropped_fraction == pytest.approx(sum(max(0, share - room) for share in shares))
  other = with_fields(capacity, {"model.moe.num_experts": 32})
  with pytest.raises(UserError, match=r"the run has 64 experts, but .* has 32"):
    plan_loads(other, CPU, [trained])


EXCHANGE = """HloModule m, is_scheduled=true

ENTRY %main (x: bf16[1024,512], n: s32[4], w: bf16[2,512,512], o: bf16[4096,512]) -> bf16[1024,512] {
  %x = bf16[1024,512]{1,0} parameter(0)
  %n = s32[4]{0} parameter(1)
  %w = bf16[2,512,512]{2,1,0} parameter(2)
  %o = bf16[4096,512]{1,0} parameter(3)
  %to = bf16[4096,512]{1,0} ragged-all-to-all(%x, %o, %n, %n, %n, %n), channel_id=1, replica_groups={{0,1,2,3}}
  %gmm.1 = bf16[4096,512]{1,0} custom-call(%n, %to, %w), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[4]{0}, bf16[4096,512]{1,0}, bf16[2,512,512]{2,1,0}}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"2147483648000","transcendentals":"0","bytes_accessed":"1"}}}
  ROOT %back = bf16[1024,512]{1,0} ragged-all-to-all(%gmm.1, %x, %n, %n, %n, %n), channel_id=2, replica_groups={{0,1,2,3}}
}
"""  # noqa: E501


@pytest.mark.parametrize("instruction", ["gmm.1", "rounded_rows.2.x"])
def test_dropless_layers_are_priced_at_their_load_and_not_for_their_whole_buffer(instruction):
  """The worst case of this buffer is 4 times the balanced load. A compiler may name a kernel after its result too."""
  v5p = parse_topology("v5p:2x2x1")
  network = Network(v5p.chip, v5p.torus, tuple(Place((i % 2, i // 2, 0), 0) for i in range(4)), {"expert": 4})

  def priced(load: float):
    return cost(parse(EXCHANGE.replace("gmm.1", instruction)), network, received=Received(load, 4.0))

  balanced, worst = priced(1.0), priced(4.0)
  assert [moved.collective.bytes for moved in balanced.collectives] == [2 * 1024 * 512] * 2
  for load in (1.0, 1.7, 4.0):
    found = priced(load)
    assert found.kernel_s == pytest.approx(worst.kernel_s * load / 4)
    assert found.flops == pytest.approx(worst.flops * load / 4)
    assert sum(moved.collective.bytes for moved in found.collectives) == pytest.approx(
      load * 2 * 2 * 1024 * 512, rel=1e-5
    )
