"""Damaged checkpoints are named and passed over: what is restored is exactly what was saved, or nothing is."""

import dataclasses
import hashlib
import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_fixtures import spec_of, tiny

from moejax.config import Checkpoints, Mesh
from moejax.errors import UserError
from moejax.training.checkpoint import UNCHECKED, Checkpointer, restore_parameters

STEPS = (2, 4)
PROGRESS = {step: {"data": {"next_index": step}, "train_time_s": 0.1 * step, "tokens": 100 * step} for step in STEPS}
POLICY = Checkpoints(every=2)


@pytest.fixture(scope="module")
def spec():
  return spec_of(tiny(False, mesh=Mesh(data=2)))


@pytest.fixture(scope="module")
def states(spec):
  """The state at each of the saved steps."""

  def at(step):
    state = spec.init_state(step)
    return dataclasses.replace(state, step=jnp.full_like(state.step, step))

  return {step: at(step) for step in STEPS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, states):
  """Checkpoints of two steps; tests damage copies."""
  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  checkpointer = Checkpointer(folder, POLICY)
  for step, state in states.items():
    checkpointer.save(state, step, PROGRESS[step])
  checkpointer.close()
  return folder


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "checkpoints")


def restore(folder, spec):
  """What training resumes from, and what it warns of."""
  told: list[str] = []
  checkpointer = Checkpointer(folder, POLICY)
  try:
    return checkpointer.restore_newest(spec.abstract_state, told.append), told
  finally:
    checkpointer.close()


def assert_same(found, states):
  step, state, progress = found
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(states[step]))
  assert progress == PROGRESS[step]


def files_of(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, chance):
  content = bytearray(path.read_bytes())
  content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
  path.write_bytes(content)


def truncate(path, chance):
  """Keeps a quarter at most: the end of a file may hold what is not needed to restore."""
  path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size // 4 + 1)])


def overwrite(path, chance):
  path.write_bytes(chance.randbytes(path.stat().st_size))


def remove(path, chance):
  path.unlink()


def check_damaged(damage, draw, copy, spec, states):
  """Damages one file of the newest checkpoint; returns the step that is restored then."""
  chance = random.Random(f"{damage.__name__} {draw}")
  victims = files_of(copy / "4")
  path = victims[draw % len(victims)]
  damage(path, chance)
  found, told = restore(copy, spec)
  assert_same(found, states)
  passed_over = found[0] == 2
  assert passed_over == any(f"{copy / '4'} is damaged" in text for text in told), (path, told)
  assert passed_over == (copy / "damaged-4").is_dir() and (copy / "4").is_dir() != passed_over
  return found[0]


@pytest.mark.parametrize("damage", [flip, truncate, overwrite, remove])
def test_the_largest_file_damaged_the_checkpoint_before_is_used(damage, copy, spec, states):
  victims = files_of(copy / "4")
  largest = max(range(len(victims)), key=lambda i: victims[i].stat().st_size)
  assert check_damaged(damage, largest, copy, spec, states) == 2


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, truncate, overwrite, remove])
def test_whatever_is_damaged_what_is_restored_is_what_was_saved(damage, saved, tmp_path, spec, states):
  used = []
  for draw in range(50):
    copy = shutil.copytree(saved, tmp_path / str(draw) / "checkpoints")
    used.append(check_damaged(damage, draw, copy, spec, states))
    shutil.rmtree(copy)
  assert used.count(2) > 10  # some files say what is not needed to restore, such as how long the save took


@pytest.mark.parametrize("missing", ["_CHECKPOINT_METADATA", "commit_success.txt", "state", "progress", "state/d"])
def test_a_checkpoint_that_lacks_a_part_or_its_marker_is_passed_over(missing, copy, spec, states):
  gone = copy / "4" / missing
  if missing == "commit_success.txt" and not gone.exists():
    pytest.skip("this Orbax writes no such marker here")
  shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
  found, told = restore(copy, spec)
  assert found[0] == 2 and f"{copy / '4'} is damaged" in told[0]
  assert_same(found, states)


@pytest.mark.parametrize("name", ["data", "train_time_s", "tokens"])
def test_a_changed_number_of_the_progress_is_found(name, copy, spec):
  path = next((copy / "4" / "progress").glob("metadata"))
  sealed = json.loads(path.read_text())
  sealed["progress"][name] = {"next_index": 3} if name == "data" else 7
  path.write_text(json.dumps(sealed))
  found, told = restore(copy, spec)
  assert found[0] == 2 and "the checksum of its progress does not match" in told[0]


def test_a_step_whose_checkpoint_was_damaged_is_saved_again(copy, spec, states):
  overwrite(max(files_of(copy / "4"), key=lambda path: path.stat().st_size), random.Random(0))
  for _ in range(2):  # a second damage gets another name
    checkpointer = Checkpointer(copy, POLICY)
    found = checkpointer.restore_newest(spec.abstract_state, lambda text: None)
    assert found[0] == 2
    checkpointer.save(states[4], 4, PROGRESS[4])
    checkpointer.close()
    found, told = restore(copy, spec)
    assert found[0] == 4 and not told
    remove(copy / "4" / "_CHECKPOINT_METADATA", None)
  assert {path.name for path in copy.iterdir()} == {"2", "4", "damaged-4", "damaged-4-2"}


def test_if_no_checkpoint_is_whole_each_is_named_and_nothing_is_deleted(copy, spec):
  for step in STEPS:
    remove(copy / str(step) / "_CHECKPOINT_METADATA", None)
  before = files_of(copy)
  named = r"checkpoints/4 is damaged \(its commit marker is missing\).*checkpoints/2 is damaged.*[Nn]othing has been"
  with pytest.raises(UserError, match=named):
    restore(copy, spec)
  with pytest.raises(UserError, match=named):
    restore_parameters(copy, spec.model.parameters, lambda text: None)
  assert files_of(copy) == before


def test_parameters_alone_are_checked_too(copy, spec, states):
  told = []
  parameters, step = restore_parameters(copy, spec.model.parameters, told.append)
  assert step == 4 and not told
  flip(max(files_of(copy / "4"), key=lambda path: path.stat().st_size), random.Random(3))
  parameters, step = restore_parameters(copy, spec.model.parameters, told.append)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(parameters), jax.device_get(states[step].parameters))
  assert (copy / "4").is_dir()
  assert step == 4 or f"{copy / '4'} is damaged" in told[0]


def test_a_checkpoint_without_checksums_is_read_with_a_warning(copy, spec, states):
  path = copy / "4" / "progress" / "metadata"
  sealed = json.loads(path.read_text())
  assert sealed["progress"].keys() == UNCHECKED
  path.write_text(json.dumps(sealed["progress"]))
  found, told = restore(copy, spec)
  assert found[0] == 4 and told == [f"{copy / '4'} was saved without checksums, so it cannot be verified"]
  assert_same(found, states)


def test_an_array_whose_checksum_is_missing_is_not_trusted(copy, spec, states):
  path = copy / "4" / "progress" / "metadata"
  content = json.loads(path.read_text())
  content["arrays"].pop(next(iter(content["arrays"])))
  sealed = {name: content[name] for name in ("progress", "arrays")}
  content["sha256"] = hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()
  path.write_text(json.dumps(content))
  found, told = restore(copy, spec)
  assert found[0] == 2 and "the checksum of " in told[0]
  assert_same(found, states)


@pytest.mark.parametrize("name", ["²", "٣", "007", "9" * 200, "a\nb"])
def test_another_directory_among_the_checkpoints_is_no_step(name, copy, spec, states):
  (copy / name).mkdir()
  found, told = restore(copy, spec)
  assert found[0] == 4 and not told
  assert_same(found, states)


def test_checksums_hold_on_another_mesh(copy, states):
  found, told = restore(copy, spec_of(tiny(False, mesh=Mesh(data=2, expert=1, model=4))))
  assert found[0] == 4 and not told
  assert_same(found, states)


def test_progress_is_that_of_the_call_even_if_it_changes_while_it_is_written(tmp_path, spec, states):
  checkpointer = Checkpointer(tmp_path / "checkpoints", POLICY)
  progress = {"data": {"next_index": 2}, "lost_s": {"save_s": 1.0}}
  checkpointer.save(states[2], 2, progress)
  progress["lost_s"]["save_s"] = 2.0
  checkpointer.close()
  assert restore(tmp_path / "checkpoints", spec)[0][2]["lost_s"] == {"save_s": 1.0}


def test_the_latest_the_best_and_those_at_multiples_are_kept_as_scores_become_known(tmp_path, spec, states):
  """Held-out bits per byte come after a step is saved, and at step 5 none come at all."""
  scores: dict[int, float] = {}
  checkpointer = Checkpointer(tmp_path / "checkpoints", Checkpoints(every=1, keep_last=1, keep_best=2, keep_every=4))
  checkpointer.compare(scores)
  for step, score in enumerate([2.0, 1.0, 3.0, 1.5, None, 1.2, 1.4, 9.0], 1):
    checkpointer.save(states[2], step, PROGRESS[2])
    if score is not None:
      scores[step] = score
  checkpointer.close()
  # Of the others, 4 and 8 are multiples of keep_every, and 8 is the latest.
  assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 4, 6, 8]


def test_a_checkpoint_is_chosen_by_its_score_or_its_step(copy, spec, states):
  lines = [{"step": 2, "held_out/bits_per_byte": 1.5}, {"step": 3, "held_out/bits_per_byte": 1.0}, {"step": 4}]
  (copy.parent / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  abstract, told = spec.model.parameters, []

  def chosen(choice):
    return restore_parameters(copy, abstract, told.append, choice)[1]

  # Step 3 is the best, but has no checkpoint.
  assert [chosen(choice) for choice in ("latest", "best", "2", "4")] == [4, 2, 2, 4]
  for choice, message in {
    "3": "has no checkpoint of step 3; its checkpoints are 2, 4",
    "newest": "checkpoint='newest' is not latest, best or a step; the checkpoints are 2, 4",
  }.items():
    with pytest.raises(UserError, match=message):
      chosen(choice)
  (copy.parent / "metrics.jsonl").unlink()
  with pytest.raises(UserError, match=r"no checkpoint of .* was evaluated \(its checkpoints: 2, 4\)"):
    chosen("best")
  (copy / "4" / "_CHECKPOINT_METADATA").unlink()
  with pytest.raises(UserError, match=r"checkpoints/4 is damaged"):
    chosen("4")
