"""Days, chip-hours and money of a whole run, and the difference of two plans by scope."""

from dataclasses import replace

import pytest

from moejax.config import Experiment
from moejax.config.parameters import full_sequence_steps
from moejax.errors import UserError
from moejax.planning.beside import beside, by_scope
from moejax.planning.plan import Plan, PlannedCollective, PlannedOperation
from moejax.planning.run_cost import run_cost
from moejax.planning.topology import parse_topology

TOPOLOGY = parse_topology("v5p:2x2x1", slices=2)


def planned(experiment: Experiment, by_scope_s: dict[str, float], exposed_s: float = 0.0) -> Plan:
  """A plan whose operations take so long by scope, and whose one collective is exposed for so long."""
  operations = tuple(
    PlannedOperation(scope=scope, of_pass="forward", kind="matrix", time_s=time_s, fraction=0.1, flops=1.0, count=1)
    for scope, time_s in by_scope_s.items()
  )
  moved = PlannedCollective(
    axis="expert", kind="all-to-all", scope="dispatch", devices=2, count=1, bytes=2.0**20, bandwidth_bytes_per_s=1.0,
    time_s=2 * exposed_s, exposed_s=exposed_s,
  )  # fmt: skip
  return Plan(
    experiment=experiment, topology=TOPOLOGY, memory_bytes={"total": 1}, compile_time_s=0.0, cached=False,
    step_time_s=sum(by_scope_s.values()) + exposed_s, executed_flops_per_device=1.0,
    breakdown_s={"collective_exposed": exposed_s}, kernel_s=0.0, operations=operations,
    collectives=(moved,) if exposed_s else (),
  )  # fmt: skip


def test_a_run_takes_its_steps_on_all_chips_and_costs_their_hours(tiny_dense):
  plan = planned(tiny_dense, {"qkv": 3.0})
  found = run_cost(plan, price_per_chip_hour=2.0)
  hours = full_sequence_steps(tiny_dense) * 3.0 / 3600
  assert found.days == pytest.approx(hours / 24)
  assert found.chip_hours == pytest.approx(8 * hours)  # two slices of four
  assert found.cost == pytest.approx(16 * hours)
  assert found.tokens == full_sequence_steps(tiny_dense) * plan.tokens_per_step
  low, high = found.days_interval
  assert (low / found.days, high / found.days) == pytest.approx([end / 3.0 for end in plan.step_time_interval_s])
  assert f"{16 * hours:.3g} at 2 per chip-hour" in found.summary
  assert "32,000 at 2 per chip-hour" in replace(found, days=32_000 / 2 / 24 / 8).summary


def test_energy_is_that_of_the_chips_and_unknown_where_no_power_is_published(tiny_dense):
  plan = planned(tiny_dense, {"qkv": 3.0})
  assert run_cost(plan).energy_kwh is None and "no published power of v5p" in run_cost(plan).summary
  found = run_cost(replace(plan, topology=parse_topology("gpu:h100:8")))
  assert found.energy_kwh == pytest.approx(0.7 * found.chip_hours)
  assert "at 700 W per chip" in found.summary


def test_without_a_price_there_is_no_cost_and_a_negative_one_is_refused(tiny_dense):
  plan = planned(tiny_dense, {"qkv": 3.0})
  assert run_cost(plan).cost is None and "per chip-hour" not in run_cost(plan).summary
  with pytest.raises(UserError, match="must be 0 or above"):
    run_cost(plan, -1.0)


def test_the_scopes_of_two_plans_add_up_to_their_step_times_and_the_largest_difference_comes_first(
  tiny_dense, tiny_moe
):
  dense = planned(tiny_dense, {"qkv": 1.0, "feed_forward": 2.0})
  moe = planned(tiny_moe, {"qkv": 1.1, "experts": 2.5, "router": 0.2, "dispatch": 0.3}, exposed_s=0.4)
  for plan in (dense, moe):
    assert sum(scope.time_s for scope in by_scope(plan).values()) == pytest.approx(plan.step_time_s)
  rows = beside(dense, moe)
  assert [row["scope"] for row in rows] == ["experts", "feed_forward", "dispatch", "router", "qkv"]
  assert sum(row["difference_s"] for row in rows) == pytest.approx(moe.step_time_s - dense.step_time_s)
  dispatch = next(row for row in rows if row["scope"] == "dispatch")
  assert dispatch["second"] == {"time_s": pytest.approx(0.7), "exposed_s": 0.4, "collective_bytes": 2.0**20}


def test_a_program_that_was_refused_has_no_operations_to_compare(tiny_dense, tiny_moe):
  refused = replace(planned(tiny_dense, {}), breakdown_s=None, step_time_s=1.0)
  with pytest.raises(UserError, match="does not fit on"):
    beside(refused, planned(tiny_moe, {"experts": 1.0}))
