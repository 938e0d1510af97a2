"""The search for the MoE of a step time, with a clock that is a formula."""

import math
import re
from dataclasses import replace

import pytest
from rich.text import Text

from moejax.comparison import pod_match
from moejax.comparison.match import distance
from moejax.comparison.pod_match import ladder, match_on_pod
from moejax.config import Experiment, Pair, TopKDepths
from moejax.config.fields import with_fields
from moejax.errors import UserError
from moejax.planning.plan import Plan
from moejax.planning.topology import parse_topology
from moejax.progress import SILENT

CPU = parse_topology("cpu:8")


@pytest.fixture
def clock(monkeypatch):
  """Makes a formula the clock, and lists the experiments whose time was asked."""
  asked: list[Experiment] = []

  def set_clock(seconds):
    def plan(experiment, topology, progress):
      asked.append(experiment)
      return Plan(
        experiment=experiment, topology=topology, memory_bytes={"total": 1}, compile_time_s=0.0, cached=False,
        step_time_s=seconds(experiment), executed_flops_per_device=None, breakdown_s={}, kernel_s=None,
      )  # fmt: skip

    monkeypatch.setattr(pod_match, "plan", plan)
    return asked

  return set_clock


def width_s(experiment: Experiment) -> float:
  """A dense model takes 100 seconds, an MoE a hundredth of a second for each of its experts' hidden units, and 40."""
  return 100.0 if experiment.model.moe is None else 40.0 + experiment.model.moe.d_ff


@pytest.mark.parametrize("d_ff", [1, 3, 17, 48, 255])
def test_experts_narrower_than_a_tile_are_varied_too(clock, tiny_dense, tiny_moe, d_ff):
  asked = clock(width_s)
  moe = with_fields(tiny_moe, {"model.moe.d_ff": d_ff, "matchable": ("model.moe.d_ff",)})
  found = match_on_pod(Pair(dense=tiny_dense, candidates=(moe,)), CPU, 0.05, SILENT)
  nearest = min([d_ff, *ladder(moe, "model.moe.d_ff")], key=lambda value: distance(40 + value, 100))
  assert found.experiment.model.moe
  assert asked[-1].model.moe and width_s(asked[-1]) != width_s(asked[1])
  assert distance(width_s(found.experiment), 100) == pytest.approx(distance(40 + nearest, 100), abs=0.05)
  assert found.match.within_tolerance == (abs(found.match.step_time_ratio - 1) <= 0.05)


@pytest.mark.parametrize("now", [1, 2, 5, 30, 256, 1000, 12_800])
def test_the_widths_that_are_tried_reach_from_below_to_four_times_what_there_is(tiny_moe, now):
  values = ladder(with_fields(tiny_moe, {"model.moe.d_ff": now}), "model.moe.d_ff")
  assert 0 < values[0] <= now and 3 * now < values[-1] <= 4 * now and len(values) >= 4


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    ({"matchable": ()}, "sparse has no field to vary: matchable is empty; set matchable to some of model.moe.d_ff"),
    ({"name": "dense"}, "both experiments are named 'dense'"),
  ],
)
def test_what_cannot_be_matched_is_refused_before_anything_is_planned(clock, tiny_dense, tiny_moe, fields, said):
  asked = clock(width_s)
  with pytest.raises(UserError, match=said):
    match_on_pod(Pair(dense=tiny_dense, candidates=(replace(tiny_moe, **fields),)), CPU, 0.05, SILENT)
  assert not asked


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused(tiny_dense, tiny_moe, tolerance):
  with pytest.raises(UserError, match=f"tolerance={tolerance} must lie between 0 and 1"):
    match_on_pod(Pair(dense=tiny_dense, candidates=(tiny_moe,)), CPU, tolerance, SILENT)


def test_the_share_of_a_mixture_of_depths_can_be_matched(tiny_dense, tiny_moe):
  losses = replace(tiny_dense.training.losses, depths=0.01)
  routed = replace(
    tiny_dense,
    name="routed",
    model=replace(tiny_dense.model, depths=TopKDepths(share=0.25)),
    training=replace(tiny_dense.training, losses=losses),
    matchable=("model.depths.share",),
  )
  Pair(dense=tiny_dense, candidates=(routed,))
  assert ladder(routed, "model.depths.share") == [i / 16 for i in range(1, 17)]
  assert set(ladder(routed, "model.num_layers")) == {2, 4}
  for experiment, field in ((routed, "model.moe.d_ff"), (tiny_moe, "model.depths.share")):
    with pytest.raises(UserError, match=f"has no {field} that can be varied; set matchable to another field"):
      ladder(experiment, field)
  with pytest.raises(
    UserError, match=r"the dense member 'routed' of a pair has model\.depths\.kind=top_k; set it to all"
  ):
    Pair(dense=routed, candidates=(tiny_moe,))


def test_both_runs_of_a_match_take_the_training_time_of_the_dense_model(clock, tiny_dense, tiny_moe):
  clock(width_s)
  moe = with_fields(tiny_moe, {"model.moe.d_ff": 30, "matchable": ("model.moe.d_ff",)})
  found = match_on_pod(Pair(dense=tiny_dense, candidates=(moe,)), CPU, 0.05, SILENT)
  lines = [part.plain for part in pod_match.match_page(found, 2.0).renderables if isinstance(part, Text)]
  days = [float(re.search(r"([\d.e+-]+) days", line)[1]) for line in lines if "whole run" in line]
  assert len(days) == 2 and days[1] == pytest.approx(days[0], rel=0.05)
  assert all("at 2 per chip-hour" in line for line in lines if "whole run" in line)
