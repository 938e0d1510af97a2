"""A run that becomes NaN or infinite: what it saves, what it says, and that its advice works."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_fixtures import prepared_on, read_metrics, tiny

from moejax.config import Checkpoints, Losses
from moejax.errors import UserError
from moejax.training.checkpoint import Checkpointer
from moejax.training.loop import Run, train
from moejax.training.not_finite import is_finite


@pytest.fixture(scope="module")
def prepared(corpus_and_data):
  corpus, data = corpus_and_data
  return prepared_on(tiny(False, data=data), corpus)


def run_of(prepared, directory, step=None, **changes):
  """A run of six steps; `changes` are fields of its experiment that are no part of the compiled step."""
  experiment = dataclasses.replace(prepared.spec.experiment, **changes)
  spec = dataclasses.replace(prepared.spec, experiment=experiment)
  return Run(spec, step or prepared.step, prepared.batches, 6, directory)


def failure(run) -> str:
  with pytest.raises(FloatingPointError) as error:
    train(run)
  assert "\n" not in str(error.value)
  return str(error.value)


def with_rate(prepared, rate):
  return dataclasses.replace(prepared.spec.experiment.optimizer, learning_rate=rate)


def strict(directory) -> list[dict]:
  """The records of metrics.jsonl, read by a parser that knows no NaN."""

  def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")

  lines = (directory / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.slow
def test_a_learning_rate_that_is_too_high_is_told_and_a_new_directory_with_a_lower_one_trains(prepared, tmp_path):
  high = with_rate(prepared, 1e38)
  said = failure(run_of(prepared, tmp_path / "high", optimizer=high))
  assert said.startswith("param_norm is ") and "at step 1. No checkpoint has been saved, " in said
  assert "new --workdir" in said and "lower --optimizer.learning-rate (now 1e+38)" in said
  (record,) = strict(tmp_path / "high")
  assert record["param_norm"] is None and record["loss"] > 0
  # What it says is so: the same command fails at the same step, and this directory refuses another learning rate.
  assert failure(run_of(prepared, tmp_path / "high", optimizer=high)) == said
  with pytest.raises(UserError, match=r"optimizer\.learning_rate is 1e\+38 there and 0\.003 here"):
    train(run_of(prepared, tmp_path / "high"))
  assert train(run_of(prepared, tmp_path / "new"))["steps"] == 6


def breaks_at(prepared, step, break_state):
  """The compiled step, which once spoils the state that it returns."""

  def poisoned(state, batch, learning_rate):
    state, metrics = prepared.step(state, batch, learning_rate)
    if int(state.step) == step:
      state = break_state(state)
      norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(state.parameters)))
      metrics = metrics | {"param_norm": norm}
    return state, metrics

  return poisoned


def nan_parameters(state):
  return dataclasses.replace(state, parameters=jax.tree.map(lambda x: x * np.nan, state.parameters))


@pytest.mark.parametrize(
  ("step", "kept"), [(3, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, None), (6, 4)))]
)
def test_a_state_that_is_not_finite_is_never_saved_and_the_newest_checkpoint_is_named(prepared, tmp_path, step, kept):
  """Checkpoints are due after steps 2, 4 and 6, and the parameters spoil after `step`, its loss being well."""
  run = run_of(prepared, tmp_path, breaks_at(prepared, step, nan_parameters))
  said = failure(run)
  assert said.startswith(f"param_norm is nan at step {step}. ")
  left = (
    "No checkpoint has been saved" if kept is None else f"The latest checkpoint is that of step {kept}, and all its"
  )
  assert left in said
  checkpointer = Checkpointer(tmp_path / "checkpoints", Checkpoints())
  steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
  assert max(steps, default=None) == kept
  assert all(is_finite(checkpointer.restore(saved, run.spec.abstract_state)[0]) for saved in steps)
  checkpointer.close()
  assert strict(tmp_path)[-1]["param_norm"] is None
  # Resumed without the fault, as after one of the hardware, the run ends well.
  assert train(run_of(prepared, tmp_path))["steps"] == 6
  assert [record["step"] for record in strict(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_gradient_that_is_infinite_before_any_update_is_not_blamed_on_the_learning_rate(corpus_and_data, tmp_path):
  corpus, data = corpus_and_data
  training = dataclasses.replace(tiny(False).training, losses=Losses(z=1e38))
  prepared = prepared_on(tiny(False, data=data, training=training), corpus)
  said = failure(run_of(prepared, tmp_path))
  assert said.startswith("grad_norm is inf at step 1. The latest checkpoint") and "training.losses" in said
  assert "the learning rate is not the cause" in said and "--optimizer" not in said


def spoilt(x):
  return x * np.nan if jnp.issubdtype(x.dtype, jnp.floating) else x


def nan_moments(state):
  return dataclasses.replace(state, optimizer=jax.tree.map(spoilt, state.optimizer))


@pytest.mark.parametrize("spoil", [nan_parameters, pytest.param(nan_moments, marks=pytest.mark.slow)])
@pytest.mark.parametrize("whole", [[2], pytest.param([], marks=pytest.mark.slow)])
def test_a_checkpoint_that_is_not_finite_is_passed_over_as_one_that_is_damaged(prepared, tmp_path, spoil, whole):
  """As another version may have saved it."""
  checkpointer = Checkpointer(tmp_path / "checkpoints", Checkpoints(keep_last=9))
  state, batches = prepared.spec.init_state(0), prepared.batches()
  for step in (2, 3, 4):
    state = dataclasses.replace(state, step=jnp.full_like(state.step, step))
    progress = {"data": batches.get_state(), "train_time_s": 0.0, "tokens": 0}
    checkpointer.save(state if step in whole else spoil(state), step, progress)
  checkpointer.close()
  run = run_of(prepared, tmp_path)
  if whole:
    assert train(run)["steps"] == 6 and read_metrics(tmp_path)[0]["step"] == 3
  else:
    with pytest.raises(UserError, match=r"checkpoints/4 is damaged \(it contains values that are NaN or infinite\)"):
      train(run)
  damaged = ("2", "3", "4") if not whole else ("damaged-3", "damaged-4")
  assert all((tmp_path / "checkpoints" / name).is_dir() for name in damaged)
