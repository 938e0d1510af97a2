"""Host offload, corrected by formula: what it frees, what it moves, and what of that is exposed."""

import dataclasses

import pytest

from moejax.config.chips import CHIPS
from moejax.errors import UserError
from moejax.experiments import EXPERIMENTS
from moejax.overrides import override
from moejax.planning.compile import Compiled
from moejax.planning.estimate import estimate
from moejax.planning.host_copies import HOST_BANDWIDTH, STAYING_LAYERS
from moejax.planning.meshes import on_topology
from moejax.planning.offload import Offloaded, offloaded
from moejax.planning.plan import Plan, plan_of
from moejax.planning.topology import parse_topology

V5P = parse_topology("v5p:4x8x8")


def planned(name: str, *options: str, needs: int = 10**11) -> Plan:
  """The plan of a program that the compiler finds too large."""
  experiment = on_topology(override(EXPERIMENTS[name](), list(options)), V5P)
  return plan_of(Compiled(experiment, None, "", {"total": needs}, 1.0, False), V5P)


def slower(plan: Plan, step_time_s: float) -> Plan:
  return dataclasses.replace(plan, step_time_s=step_time_s)


@pytest.mark.parametrize("remat", ["none", "products", "dots", "attention", "layer_inputs"])
@pytest.mark.parametrize("name", ["dense_6b4", "moe_6b4_64e"])
@pytest.mark.parametrize("parts", [1, 2])
def test_activations_are_moved_out_and_back_once_for_each_part(name, remat, parts):
  plan = planned(name, "--model.remat", remat, "--training.gradient-accumulation", str(parts))
  saved = estimate(plan.experiment, plan.topology).saved_activations
  found = offloaded(plan, ["activations"])
  assert 0 < saved < plan.memory_by_group["activations"]
  assert found.traffic_bytes == pytest.approx(2 * saved * parts)
  assert found.freed_bytes == pytest.approx(saved * (1 - STAYING_LAYERS / plan.experiment.model.num_layers))
  assert found.traffic_s == pytest.approx(found.traffic_bytes / HOST_BANDWIDTH["v5p"])
  # All of it is hidden behind a long step, and none behind one that takes no time.
  assert offloaded(slower(plan, 1e4), ["activations"]).exposed_s == 0
  assert offloaded(slower(plan, 1e-9), ["activations"]).exposed_s == pytest.approx(found.traffic_s, rel=1e-3)


def test_moments_are_read_and_written_while_the_update_waits():
  adam, lion = planned("dense_6b4"), planned("dense_6b4", "--optimizer.kind", "Lion")
  found = offloaded(adam, ["moments"])
  moments = adam.memory_by_group["moments"]
  assert found.freed_bytes == moments and found.traffic_bytes == 2 * moments
  assert found.exposed_s == found.traffic_s == pytest.approx(moments / HOST_BANDWIDTH["v5p"])
  assert offloaded(lion, ["moments"]).freed_bytes == pytest.approx(moments / 2)
  assert offloaded(slower(adam, 1e4), ["moments"]).exposed_s == found.exposed_s


def test_both_together_free_and_cost_the_sum_and_may_make_a_plan_fit():
  plan = planned("moe_6b4_64e")
  both, *each = (offloaded(plan, what) for what in (["activations", "moments"], ["activations"], ["moments"]))
  for name in ("freed_bytes", "traffic_bytes", "traffic_s", "exposed_s"):
    assert getattr(both, name) == pytest.approx(sum(getattr(one, name) for one in each))
  assert offloaded(plan, ["moments", "activations", "moments"]).traffic_bytes == both.traffic_bytes
  needs = int(plan.hbm_limit_bytes + both.freed_bytes)
  assert offloaded(planned("moe_6b4_64e", needs=needs - 10), ["activations", "moments"]).fits
  too_large: Offloaded = offloaded(planned("moe_6b4_64e", needs=needs + 10), ["activations", "moments"])
  assert not too_large.fits and "does not fit" in too_large.summary
  assert too_large.to_json()["step_time_s"] == too_large.step_time_s > too_large.plan.step_time_s


def test_what_cannot_move_and_a_device_without_a_host_are_refused():
  with pytest.raises(UserError, match="--offload weights: activations and moments can move"):
    offloaded(planned("dense_6b4"), ["weights"])
  plan = planned("dense_6b4")
  cpu = dataclasses.replace(plan, topology=parse_topology("cpu:8"))
  with pytest.raises(UserError, match="because cpu uses the memory of its host"):
    offloaded(cpu, ["moments"])
  assert HOST_BANDWIDTH.keys() == CHIPS.keys() - {"cpu"}
