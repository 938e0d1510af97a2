"""Whose directory it is."""

import errno
import json
import os
import pathlib
import re
from dataclasses import replace

import pytest

from moejax.config import Checkpoints, Evaluation, Losses, Mesh
from moejax.config.fields import with_fields
from moejax.config.plain import to_plain
from moejax.errors import UserError
from moejax.training.run_directory import (
  COMPARISON,
  RUN,
  claim,
  claim_comparison,
  open_run,
  prepare_directory,
  read_experiment,
  run_configuration,
)


def held(directory: pathlib.Path, file: str = RUN) -> dict:
  return json.loads((directory / file).read_text())


def files(directory: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_fresh_directory_is_made_and_holds_the_resolved_experiment_and_nothing_else(tiny_moe, tmp_path):
  directory = tmp_path / "runs" / "mine"
  claim(directory, tiny_moe, 7)
  assert list(files(directory)) == [RUN]
  assert held(directory) == {"steps": 7} | json.loads(json.dumps(to_plain(tiny_moe)))


def test_the_same_experiment_goes_on(tiny_moe, tmp_path):
  claim(tmp_path, tiny_moe, 7)
  before = files(tmp_path)
  claim(tmp_path, tiny_moe, 7)
  assert files(tmp_path) == before


def test_another_experiment_is_refused_with_the_field_and_both_values_and_the_directory_stays_as_it_is(
  tiny_moe, tmp_path
):
  claim(tmp_path, tiny_moe, 7)
  before = files(tmp_path)
  other = replace(tiny_moe, optimizer=replace(tiny_moe.optimizer, learning_rate=0.5))
  message = (
    f"{tmp_path} holds another configuration: optimizer.learning_rate is 0.001 there and 0.5 here; "
    "choose another --workdir, or restore the configuration to resume"
  )
  with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
    claim(tmp_path, other, 7)
  assert files(tmp_path) == before


def of_length(experiment, steps):
  return replace(experiment, training=replace(experiment.training, steps=steps))


def trained(directory: pathlib.Path, *steps: int) -> None:
  """Leaves what a run that was saved at these steps leaves, as far as its names go."""
  for step in steps:
    (directory / "checkpoints" / str(step)).mkdir(parents=True)
  (directory / "checkpoints" / f"{max(steps) + 1}.orbax-checkpoint-tmp").mkdir()


def test_a_run_is_made_longer_by_its_steps_and_remembers_which_schedule_it_followed(tiny_moe, tmp_path):
  assert claim(tmp_path, tiny_moe, 7) == []
  trained(tmp_path, 5, 7)
  longer = of_length(tiny_moe, 9)
  before = files(tmp_path)
  open_run(tmp_path, longer, 9)
  assert files(tmp_path) == before
  earlier = [{"steps": 7, "last_step": 7}]
  assert claim(tmp_path, longer, 9) == earlier
  assert held(tmp_path) == json.loads(json.dumps(run_configuration(longer, 9) | {"earlier_schedules": earlier}))
  # Again, and once more longer: of the 9 no step was done.
  assert claim(tmp_path, longer, 9) == earlier
  assert claim(tmp_path, of_length(tiny_moe, 12), 12) == earlier
  trained(tmp_path, 10)
  both = [*earlier, {"steps": 12, "last_step": 10}]
  assert claim(tmp_path, of_length(tiny_moe, 11), 11) == both
  assert read_experiment(tmp_path) == of_length(tiny_moe, 11)


def test_a_run_of_which_nothing_is_done_has_another_length_and_no_past(tiny_moe, tmp_path):
  claim(tmp_path, tiny_moe, 7)
  assert claim(tmp_path, of_length(tiny_moe, 3), 3) == []


def test_a_run_does_not_become_shorter_than_it_is(tiny_moe, tmp_path):
  claim(tmp_path, tiny_moe, 7)
  trained(tmp_path, 5)
  assert claim(tmp_path, of_length(tiny_moe, 5), 5) == [{"steps": 7, "last_step": 5}]
  message = f"training.steps=4 is less than the 5 steps that {tmp_path} has trained; use 5 or more, or choose another"
  with pytest.raises(UserError, match=f"^{re.escape(message)} --workdir$"):
    claim(tmp_path, of_length(tiny_moe, 4), 4)


def test_a_run_does_not_become_longer_by_an_option_that_was_forgotten(tiny_moe, tmp_path):
  claim(tmp_path, of_length(tiny_moe, 7), 7)
  with pytest.raises(UserError, match=r"holds a run of 7 steps, but the budget .* is 672 .* --training\.steps 7, or"):
    claim(tmp_path, tiny_moe, 672)


def test_of_many_differences_three_are_named_and_the_rest_counted(tiny_moe, tmp_path):
  claim(tmp_path, tiny_moe, 7)
  other = replace(tiny_moe, name="other", optimizer=replace(tiny_moe.optimizer, beta1=0.5, beta2=0.5, epsilon=1.0))
  with pytest.raises(UserError) as error:
    claim(tmp_path, other, 7)
  assert "name is 'sparse' there and 'other' here; optimizer.beta1 is 0.9 there and 0.5 here" in str(error.value)
  assert "optimizer.beta2 is 0.95 there and 0.5 here and 1 more; choose" in str(error.value)


def test_an_experiment_that_became_dense_is_refused_in_one_short_line(tiny_moe, tmp_path):
  claim(tmp_path, tiny_moe, 7)
  model, training = replace(tiny_moe.model, moe=None), replace(tiny_moe.training, losses=Losses())
  with pytest.raises(UserError, match=r"model\.moe is \{'num_experts': 4, .{0,60}\.\.\. there and None here"):
    claim(tmp_path, replace(tiny_moe, model=model, training=training), 7)


@pytest.mark.parametrize(
  "change",
  [
    lambda e: replace(e, mesh=Mesh(data=2, expert=2)),
    lambda e: replace(e, rules=(*e.rules, ("embed", ()))),
    lambda e: replace(e, data=replace(e.data, prefetch=2)),
    lambda e: replace(e, training=replace(e.training, log_every=1)),
    lambda e: replace(e, training=replace(e.training, checkpoints=Checkpoints(every=5))),
    lambda e: replace(e, evaluation=Evaluation(batch_size=4)),
    lambda e: replace(e, model=replace(e.model, remat="dots")),
    lambda e: replace(e, matchable=("model.num_layers",)),
    lambda e: with_fields(e, {"model.moe.dispatch.exchange": "all_gather"}),
  ],
  ids=["mesh", "rules", "prefetch", "log_every", "checkpoints", "evaluation", "remat", "matchable", "exchange"],
)
def test_what_never_changes_the_result_may_change_and_is_noted(tiny_moe, tmp_path, change):
  tiny_moe = replace(tiny_moe, model=replace(tiny_moe.model, moe=replace(tiny_moe.model.moe, dispatch="grouped")))
  claim(tmp_path, tiny_moe, 7)
  changed = change(tiny_moe)
  assert changed != tiny_moe
  claim(tmp_path, changed, 7)
  assert held(tmp_path) == json.loads(json.dumps(run_configuration(changed, 7)))


def test_a_run_of_an_earlier_version_resumes_with_the_kinds_that_it_had(tiny_moe, tmp_path):
  """It lists the fields of all routers and dispatches, and `free`."""
  claim(tmp_path, tiny_moe, 7)
  stored = held(tmp_path)
  moe = stored["model"]["moe"]
  stored["free"] = stored.pop("matchable")
  del stored["model"]["feed_forward"]
  moe["router"] |= {"threshold": None}
  moe |= {"dispatch": "einsum", "priority": "choice", "exchange": "all_to_all", "receive_factor": None}
  (tmp_path / RUN).write_text(json.dumps(stored))
  claim(tmp_path, tiny_moe, 7)
  assert held(tmp_path) == json.loads(json.dumps(run_configuration(tiny_moe, 7)))
  moe["priority"] = "token"
  (tmp_path / RUN).write_text(json.dumps(stored))
  with pytest.raises(UserError, match=r"model\.moe\.dispatch\.priority is 'token' there and 'choice' here"):
    claim(tmp_path, tiny_moe, 7)


def test_another_suite_is_refused_with_the_path_of_the_field(tiny_suite, tmp_path):
  claim_comparison(tmp_path, tiny_suite)
  (pair,) = tiny_suite.pairs
  first, second = pair.candidates
  second = replace(second, training=replace(second.training, batch_size=16))
  other = replace(tiny_suite, pairs=(replace(pair, candidates=(first, second)),))
  with pytest.raises(
    UserError, match=r"configuration: pairs\.0\.candidates\.1\.training\.batch_size is 8 there and 16 here; choose"
  ):
    claim_comparison(tmp_path, other)


def test_a_suite_with_fewer_candidates_is_refused_in_one_short_line(tiny_suite, tmp_path):
  claim_comparison(tmp_path, tiny_suite)
  (pair,) = tiny_suite.pairs
  other = replace(tiny_suite, pairs=(replace(pair, candidates=pair.candidates[:1]),))
  with pytest.raises(UserError, match=r"configuration: pairs\.0\.candidates is \[") as error:
    claim_comparison(tmp_path, other)
  assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_what_is_logged_and_saved_of_a_comparison_may_change(tiny_suite, tmp_path):
  claim_comparison(tmp_path, tiny_suite)
  (pair,) = tiny_suite.pairs
  training = replace(pair.dense.training, log_every=1, checkpoints=Checkpoints(every=5))
  other = replace(tiny_suite, pairs=(replace(pair, dense=replace(pair.dense, training=training)),))
  claim_comparison(tmp_path, other)
  assert held(tmp_path, COMPARISON)["pairs"][0]["dense"]["training"]["log_every"] == 1


def test_step_times_depend_on_the_mesh_so_a_comparison_keeps_its_own(tiny_suite, tmp_path):
  claim_comparison(tmp_path, tiny_suite)
  (pair,) = tiny_suite.pairs
  other = replace(tiny_suite, pairs=(replace(pair, dense=replace(pair.dense, mesh=Mesh(data=2))),))
  with pytest.raises(UserError, match=r"pairs\.0\.dense\.mesh\.data is None there and 2 here"):
    claim_comparison(tmp_path, other)


def test_a_run_does_not_go_into_a_comparisons_directory_nor_the_other_way(tiny_moe, tiny_suite, tmp_path):
  claim_comparison(tmp_path / "comparison", tiny_suite)
  with pytest.raises(UserError, match=r"comparison holds a comparison; choose another --workdir$"):
    claim(tmp_path / "comparison", tiny_moe, 7)
  claim(tmp_path / "run", tiny_moe, 7)
  with pytest.raises(UserError, match=r"run holds a run; choose another --workdir$"):
    claim_comparison(tmp_path / "run", tiny_suite)


def test_a_file_that_is_no_configuration_is_refused_and_not_overwritten(tiny_moe, tmp_path):
  (tmp_path / RUN).write_text("my notes")
  with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / RUN))} is not JSON \(.*\); choose another"):
    claim(tmp_path, tiny_moe, 7)
  assert files(tmp_path) == {RUN: b"my notes"}


def test_checking_refuses_as_claiming_does_and_leaves_nothing(tiny_moe, tmp_path):
  assert open_run(tmp_path / "new", tiny_moe, 7) == tmp_path / "new"
  assert files(tmp_path / "new") == {}
  claim(tmp_path / "new", tiny_moe, 7)
  with pytest.raises(UserError, match=r"training\.seed is 0 there and 1 here"):
    open_run(tmp_path / "new", replace(tiny_moe, training=replace(tiny_moe.training, seed=1)), 7)


def test_a_directory_is_made_with_its_parents_and_the_try_to_write_leaves_nothing(tmp_path):
  prepare_directory(tmp_path / "a" / "b")
  assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_in_the_directorys_place_is_refused(tmp_path):
  (tmp_path / "file").write_text("mine")
  message = f"cannot write to {tmp_path / 'file'}: it is a file; choose another --workdir"
  with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
    prepare_directory(tmp_path / "file")
  with pytest.raises(UserError, match=r"/file/below: Not a directory; choose another --workdir$"):
    prepare_directory(tmp_path / "file" / "below")
  assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_is_refused(tmp_path):
  tmp_path.chmod(0o500)
  try:
    with pytest.raises(UserError, match=r": Permission denied; choose another --workdir$"):
      prepare_directory(tmp_path)
  finally:
    tmp_path.chmod(0o700)


def test_a_full_disk_is_found_and_nothing_is_left_behind(tmp_path, monkeypatch):
  def write_bytes(path: pathlib.Path, data: bytes) -> int:
    path.touch()  # a full disk still makes the file
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(pathlib.Path, "write_bytes", write_bytes)
  with pytest.raises(UserError, match=r": No space left on device; choose another --workdir$"):
    prepare_directory(tmp_path)
  assert list(tmp_path.iterdir()) == []
