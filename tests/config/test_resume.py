"""Which fields may change when a run or a comparison resumes."""

from moejax.config import Experiment, Suite
from moejax.config.resume import changeable


def test_what_does_not_decide_a_result_may_change_in_a_run():
  assert {*changeable(Experiment, "run")} == {
    "model.remat", "data.prefetch", "training.checkpoints", "training.log_every", "evaluation", "mesh", "rules",
    "matchable",
  }  # fmt: skip


def test_of_a_comparison_only_what_changes_neither_step_times_nor_scores():
  fields = ("data.prefetch", "training.checkpoints", "training.log_every", "matchable")
  places = ("pairs.*.dense", "pairs.*.candidates.*")
  assert {*changeable(Suite, "comparison")} == {f"{place}.{field}" for place in places for field in fields}
