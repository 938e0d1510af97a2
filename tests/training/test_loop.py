"""The loop: resumes bit for bit, reports every step, and loses nothing when stopped."""

import dataclasses
import errno
import functools
import json
import math
import os
import re
import signal

import jax
import numpy as np
import pytest
from training_fixtures import prepared_on, read_metrics, tiny

from moejax.config import Checkpoints, Evaluation, GroupedDispatch, Mesh, Precision, Router
from moejax.data.target_count import TargetCounter
from moejax.errors import Failure, UserError
from moejax.interrupts import Interrupted
from moejax.partitioning import to_devices
from moejax.training.checkpoint import Checkpointer
from moejax.training.loop import Run, train
from moejax.training.optimizers import learning_rate


@functools.cache
def prepared_for(experiment, corpus):
  """Compiled once for all runs of this module; every run begins with its own state and batches."""
  return prepared_on(experiment, corpus)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus_and_data):
  """The MoE's run that nothing interrupts; tests only read it."""
  return start(tmp_path_factory.mktemp("straight"), corpus_and_data)[0]


def start(
  directory,
  corpus_and_data,
  sparse=True,
  mesh=None,
  steps=6,
  observe=lambda _: None,
  evaluators=None,
  warn=lambda _: None,
  precision=None,
):
  corpus, data = corpus_and_data
  experiment = tiny(sparse, data=data, mesh=mesh or Mesh(data=1))
  if sparse:  # a bias and noise, so that a resume that lost either, or the step that noise follows from, would show
    moe = dataclasses.replace(experiment.model.moe, router=Router(bias_rate=0.01, gumbel=0.5))
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, moe=moe))
  if precision:
    moe = dataclasses.replace(experiment.model.moe, dispatch=GroupedDispatch())
    model = dataclasses.replace(experiment.model, moe=moe, precision=precision)
    experiment = dataclasses.replace(experiment, model=model)
  prepared = prepared_for(experiment, corpus)
  run = Run(
    spec=prepared.spec,
    step=prepared.step,
    batches=prepared.batches,
    steps=steps,
    directory=directory,
    evaluators=evaluators or {},
    observe=observe,
    warn=warn,
  )
  return run, train(run)


def final_state(run):
  checkpointer = Checkpointer(run.directory / "checkpoints", Checkpoints())
  state, progress = checkpointer.restore(run.steps, run.spec.abstract_state)
  checkpointer.close()
  return jax.device_get(state), progress


def stop_at(step):
  """An observer that sends Ctrl-C to this process when the record of `step` is reported."""

  def observe(record):
    if record["step"] == step:
      os.kill(os.getpid(), signal.SIGINT)

  return observe


def without_times(records):
  timed = ("step_time_s", "tokens_per_s", "mfu")
  return [{name: value for name, value in record.items() if name not in timed} for record in records]


def test_a_run_that_is_interrupted_twice_ends_with_the_very_bits_of_one_that_is_not(
  tmp_path, corpus_and_data, straight
):
  for step in (1, 3):
    with pytest.raises(Interrupted):
      start(tmp_path / "stopped", corpus_and_data, observe=stop_at(step))
  stopped, _ = start(tmp_path / "stopped", corpus_and_data)
  expected, expected_progress = final_state(straight)
  found, progress = final_state(stopped)
  for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(mine, other)
  assert progress["data"] == expected_progress["data"] and progress["tokens"] == expected_progress["tokens"] > 0
  assert without_times(read_metrics(stopped.directory)) == without_times(read_metrics(straight.directory))


@pytest.mark.parametrize(
  "bits", [pytest.param("fp8", marks=pytest.mark.slow), pytest.param("int8", marks=pytest.mark.nightly)]
)
def test_a_run_with_8_bit_products_resumes_to_the_very_bits_of_one_that_is_not_stopped(tmp_path, corpus_and_data, bits):
  """Scales are those of the values at hand, and no state. The experts are spread over devices, whose scales agree."""
  fields = {
    "precision": Precision(attention=bits, feed_forward=bits, experts=bits, logits=bits),
    "mesh": Mesh(data=2, expert=2, model=2),
  }
  whole, _ = start(tmp_path / "whole", corpus_and_data, **fields)
  for step in (1, 3):
    with pytest.raises(Interrupted):
      start(tmp_path / "stopped", corpus_and_data, observe=stop_at(step), **fields)
  stopped, _ = start(tmp_path / "stopped", corpus_and_data, **fields)
  for mine, other in zip(*(jax.tree.leaves(final_state(run)[0]) for run in (stopped, whole)), strict=True):
    np.testing.assert_array_equal(mine, other)
  assert without_times(read_metrics(stopped.directory)) == without_times(read_metrics(whole.directory))


def test_a_run_goes_on_from_the_newest_checkpoint_when_the_later_steps_were_lost(tmp_path, corpus_and_data, straight):

  class Killed(Exception):
    pass

  def die(record):
    if record["step"] == 4:  # after the checkpoint of step 4's predecessor, before its own
      raise Killed

  with pytest.raises(Killed):
    start(tmp_path / "killed", corpus_and_data, observe=die)
  assert max(int(path.name) for path in (tmp_path / "killed" / "checkpoints").iterdir()) == 2
  steps = []
  killed, _ = start(tmp_path / "killed", corpus_and_data, observe=lambda record: steps.append(record["step"]))
  assert steps == [3, 4, 5, 6]
  for mine, other in zip(
    jax.tree.leaves(final_state(killed)[0]), jax.tree.leaves(final_state(straight)[0]), strict=True
  ):
    np.testing.assert_array_equal(mine, other)
  assert [record["step"] for record in read_metrics(killed.directory)] == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_very_bits_of_one_that_is_not(
  tmp_path, corpus_and_data, straight
):
  with pytest.raises(Interrupted):
    start(tmp_path, corpus_and_data, observe=stop_at(4))
  newest = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
  damaged = max((tmp_path / "checkpoints" / str(newest)).rglob("d/*"), key=lambda path: path.stat().st_size)
  damaged.write_bytes(bytes(damaged.stat().st_size))
  steps, told = [], []
  run, _ = start(tmp_path, corpus_and_data, observe=lambda record: steps.append(record["step"]), warn=told.append)
  assert steps[0] <= newest and steps[-1] == 6 and f"checkpoints/{newest} is damaged" in told[0]
  for mine, other in zip(jax.tree.leaves(final_state(run)[0]), jax.tree.leaves(final_state(straight)[0]), strict=True):
    np.testing.assert_array_equal(mine, other)
  assert without_times(read_metrics(tmp_path)) == without_times(read_metrics(straight.directory))


@pytest.mark.slow
def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path, corpus_and_data, straight):
  with pytest.raises(Interrupted):
    start(tmp_path / "moved", corpus_and_data, observe=stop_at(3))
  moved, _ = start(tmp_path / "moved", corpus_and_data, mesh=Mesh(data=2, expert=2, model=2))
  for mine, other in zip(
    jax.tree.leaves(final_state(moved)[0].parameters), jax.tree.leaves(final_state(straight)[0].parameters), strict=True
  ):
    np.testing.assert_allclose(mine, other, atol=3e-4)  # as in test_step: sums over shards round differently


def test_a_finished_run_trains_no_more_and_scores_what_was_not_scored(tmp_path, corpus_and_data):
  start(tmp_path, corpus_and_data)
  steps, scored = [], []

  def score(state):
    scored.append(int(state.step))
    return {"value": 1.5}

  for times in (1, 2):  # the second time the scores are written, and the summary may not be
    _, summary = start(
      tmp_path, corpus_and_data, observe=lambda record: steps.append(record["step"]), evaluators={"again": score}
    )
    assert steps == [] and scored == [6] * times and summary["again/value"] == 1.5
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 6]
    assert records[-1] == {"step": 6, "again/value": 1.5}


def test_a_finished_run_trained_longer_follows_the_old_schedule_and_then_that_of_its_new_length(
  tmp_path, corpus_and_data
):
  """Equal, bit by bit, to the same steps with the learning rates of 4 steps and then of 6, by hand."""
  corpus, data = corpus_and_data

  def of(steps):
    return tiny(False, data=data, training=dataclasses.replace(tiny(False).training, steps=steps))

  def run(steps, told):
    spec = dataclasses.replace(prepared.spec, experiment=of(steps))
    return Run(spec, prepared.step, prepared.batches, steps, tmp_path, warn=told.append)

  prepared, optimizer = prepared_for(of(6), corpus), tiny(False).optimizer
  state, batches = prepared.spec.init_state(0), prepared.batches()
  for step in range(6):
    rate = learning_rate(optimizer, step, 4 if step < 4 else 6)
    state, _ = prepared.step(state, to_devices(next(batches), prepared.spec.partitioner.batch), np.float32(rate))

  told: list[str] = []
  assert train(run(4, told))["steps"] == 4 and told == []
  summary = train(run(6, told))
  found, _ = final_state(run(6, told))
  for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(jax.device_get(state)), strict=True):
    np.testing.assert_array_equal(mine, other)
  assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
  assert summary["steps"] == 6 and summary["earlier_schedules"] == [{"steps": 4, "last_step": 4}]
  (text,) = told
  rates = f"from {learning_rate(optimizer, 3, 4):.4g} at step 4 to {learning_rate(optimizer, 4, 6):.4g} at step 5"
  assert "changes from 4 to 6 steps" in text and rates in text
  # Once more it is the same run, of which there is nothing to tell.
  train(run(6, told))
  assert len(told) == 1
  with pytest.raises(UserError, match=r"training\.steps=5 is less than the 6 steps that"):
    train(run(5, told))


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.nightly), "layer_inputs"])
def test_a_run_resumes_with_other_remat(tmp_path, corpus_and_data, remat):
  """What is recomputed rounds as what is kept, within a few units in the last place."""
  corpus, data = corpus_and_data
  plain = tiny(False, data=data)
  other = dataclasses.replace(plain, model=dataclasses.replace(plain.model, remat=remat))

  def run(experiment, directory, **seen):
    prepared = prepared_for(experiment, corpus)
    return Run(prepared.spec, prepared.step, prepared.batches, 6, directory, **seen)

  train(run(plain, tmp_path / "straight"))
  with pytest.raises(Interrupted):
    train(run(plain, tmp_path / "changed", observe=stop_at(3)))
  train(run(other, tmp_path / "changed"))
  states = [final_state(run(plain, tmp_path / name))[0] for name in ("straight", "changed")]
  for mine, expected in zip(*(jax.tree.leaves(state.parameters) for state in states), strict=True):
    np.testing.assert_allclose(mine, expected, atol=1e-4)


def test_metrics_have_the_contracts_keys_for_every_step_and_only_plain_numbers(straight, corpus_and_data):
  records = read_metrics(straight.directory)
  assert [record["step"] for record in records] == list(range(1, 7))
  for name in (
    "loss", "tokens_per_s", "step_time_s", "learning_rate", "grad_norm", "param_norm", "loss/z", "loss/load_balance",
    "loss/router_z", "router/load_max_over_mean/layer_01", "router/dropped_fraction/layer_01",
    "router/entropy/layer_01",
  ):  # fmt: skip
    assert all(isinstance(record[name], float) and math.isfinite(record[name]) for record in records), name
  assert all(np.isclose(sum(record["router/load"][0]), 1.0, atol=1e-3) for record in records)
  assert any((straight.directory / "tensorboard").iterdir())
  summary = json.loads((straight.directory / "summary.json").read_text())
  assert summary["steps"] == 6 and summary["provenance"]["versions"]["jax"]
  # What a run counts is what was told before it.
  corpus, data = corpus_and_data
  tokens = TargetCounter(corpus).tokens(tiny(True, data=data), 6)
  assert summary["tokens"] == tokens == sum(record["target_tokens"] for record in records) > 0
  assert all(0 <= record["router/dropped_fraction"] < 1 for record in records)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint_before_it(tmp_path, corpus_and_data):
  corpus, data = corpus_and_data
  experiment = tiny(False, data=data)
  prepared = prepared_for(experiment, corpus)

  def poisoned(state, batch, learning_rate):
    state, metrics = prepared.step(state, batch, learning_rate)
    return state, metrics | {"loss": metrics["loss"] + (np.nan if int(state.step) == 3 else 0.0)}

  run = Run(prepared.spec, poisoned, prepared.batches, 6, tmp_path)
  with pytest.raises(FloatingPointError, match=r"loss is nan at step 3\. The latest checkpoint is that of step 2,"):
    train(run)
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_old_checkpoints_go_and_those_at_multiples_of_keep_every_stay(tmp_path, corpus_and_data):
  corpus, data = corpus_and_data
  experiment = tiny(False, data=data)
  policy = Checkpoints(every=1, keep_last=1, keep_every=2)
  experiment = dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, checkpoints=policy))
  prepared = prepared_on(experiment, corpus)
  train(Run(prepared.spec, prepared.step, prepared.batches, 5, tmp_path))
  assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 4, 5]


def test_the_best_checkpoint_is_kept_by_what_its_evaluation_gave_also_after_a_stop(tmp_path, corpus_and_data):
  corpus, data = corpus_and_data
  policy = Checkpoints(every=1, keep_last=1, keep_best=1)
  experiment = tiny(False, data=data, evaluation=Evaluation(every=1, batch_size=8))
  experiment = dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, checkpoints=policy))
  prepared = prepared_for(experiment, corpus)

  def run(**seen):
    def score(state):
      return {"bits_per_byte": abs(int(state.step) - 2.1)}  # the best is step 2

    evaluators = {"held_out": score}
    return Run(prepared.spec, prepared.step, prepared.batches, 6, tmp_path, evaluators=evaluators, **seen)

  with pytest.raises(Interrupted):
    train(run(observe=stop_at(3)))
  train(run())
  assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 6]


def test_training_continues_while_the_disk_is_full_and_ends_well_once_it_is_not(tmp_path, corpus_and_data, monkeypatch):
  """The disk is full at the saves of steps 2 and 4, and has room at that of step 6."""
  told, real = [], os.mkdir

  def mkdir(path, *arguments, **options):
    if re.search(r"/[24]\.orbax-checkpoint-tmp", str(path)):
      raise OSError(errno.ENOSPC, "No space left on device", str(path))
    return real(path, *arguments, **options)

  monkeypatch.setattr(os, "mkdir", mkdir)
  _, summary = start(tmp_path, corpus_and_data, warn=told.append)
  assert summary["steps"] == 6 and len(read_metrics(tmp_path)) == 6
  assert [text.partition(" could not")[0] for text in told] == [f"the checkpoint of step {n}" for n in (2, 4)]
  assert all("No space left on device" in text and "no checkpoint is saved yet" in text for text in told)
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["6"]


def test_a_last_step_that_cannot_be_saved_is_an_error_and_the_older_checkpoint_stays(
  tmp_path, corpus_and_data, monkeypatch, straight
):
  told, real = [], os.mkdir

  def mkdir(path, *arguments, **options):
    if re.search(r"/[46]\.orbax-checkpoint-tmp", str(path)):
      raise OSError(errno.EROFS, "Read-only file system", str(path))
    return real(path, *arguments, **options)

  monkeypatch.setattr(os, "mkdir", mkdir)
  with pytest.raises(Failure, match=r"the last checkpoint \(step 6\) could not be saved .*resumes from step 2"):
    start(tmp_path, corpus_and_data, warn=told.append)
  assert len(told) == 3 and all("Read-only" in text and "checkpoint is that of step 2" in text for text in told)
  monkeypatch.setattr(os, "mkdir", real)
  run, _ = start(tmp_path, corpus_and_data)
  for mine, other in zip(jax.tree.leaves(final_state(run)[0]), jax.tree.leaves(final_state(straight)[0]), strict=True):
    np.testing.assert_array_equal(mine, other)
