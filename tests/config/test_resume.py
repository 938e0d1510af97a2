"""Which fields may change when a run or a comparison resumes."""

import dataclasses
import gc

from moejax.config import Experiment, Schedule, Suite
from moejax.config.resume import RUN_MAY_CHANGE, changeable


def test_what_does_not_decide_a_result_may_change_in_a_run():
  assert {*changeable(Experiment, "run")} == {
    "model.logit_chunks", "model.remat", "data.prefetch", "training.checkpoints", "training.log_every", "evaluation",
    "mesh", "rules", "matchable", "model.moe.dispatch.exchange", "model.moe.dispatch.exchange_chunks",
    "model.save_activations", "model.offload_activations", "optimizer.offload_moments",
    "training.anomalies.max_skipped", "training.anomalies.then",
  }  # fmt: skip


def test_a_field_of_a_kind_of_the_users_own_may_be_marked_too():
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Verbose(Schedule, kind="test_verbose"):
    verbose: bool = dataclasses.field(default=False, metadata=RUN_MAY_CHANGE)

  assert "optimizer.schedule.verbose" in changeable(Experiment, "run")
  del Verbose
  gc.collect()  # no other test knows it


def test_of_a_comparison_only_what_changes_neither_step_times_nor_scores():
  fields = ("data.prefetch", "training.checkpoints", "training.log_every", "matchable")
  places = ("pairs.*.dense", "pairs.*.candidates.*")
  assert {*changeable(Suite, "comparison")} == {f"{place}.{field}" for place in places for field in fields}
