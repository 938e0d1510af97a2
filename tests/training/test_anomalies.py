"""Steps whose loss or gradient is not finite, or whose loss is a spike: skipped, counted, and passed by a rewind."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_fixtures import initial_state, random_batch, read_metrics, spec_of, step_of, tiny

from moejax.config import Anomalies
from moejax.partitioning import to_devices
from moejax.training.anomalies import RECENT_STEPS, WARMUP_STEPS, Watched, is_accepted, with_loss
from moejax.training.checkpoint import Checkpointer
from moejax.training.loop import Run, train
from moejax.training.optimizers import learning_rate
from moejax.training.skips import MAX_REWINDS


def assert_equal(mine, other):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(mine), jax.device_get(other))


def poison(batch):
  """A batch whose loss is NaN."""
  return batch | {"weights": jnp.full_like(batch["weights"], jnp.nan)}


@pytest.mark.parametrize("sparse", [False, True])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(sparse):
  experiment = tiny(sparse)
  spec, step = spec_of(experiment), step_of(experiment)

  def after(*batches):
    state = jax.device_put(initial_state(experiment.model, experiment.optimizer, 0), spec.shardings)
    skipped = []
    for batch in batches:
      state, metrics = step(state, jax.device_put(batch, spec.partitioner.batch), jnp.float32(3e-3))
      skipped.append(float(metrics["skipped"]))
    return state, skipped

  good = random_batch(experiment)
  (state, skipped), (straight, none) = after(good, poison(good), good), after(good, good)
  assert (skipped, none) == ([0, 1, 0], [0, 0]) and int(state.step) == 3
  assert_equal((state.parameters, state.optimizer), (straight.parameters, straight.optimizer))


def poisoned(step, numbers):
  """The step, to which the batches of these numbers, in the order of the calls, are poisoned."""
  calls = iter(range(10**6))

  def wrapped(state, batch, rate):
    return step(state, poison(batch) if next(calls) in numbers else batch, rate)

  return wrapped


@pytest.fixture(scope="module")
def start(corpus_and_data):
  """Starts a run of six steps in which batches of these numbers are poisoned."""
  from moejax.data.mixture import training_mixture
  from moejax.data.pipeline import train_batches

  corpus, data = corpus_and_data
  base = tiny(False, data=data)
  step = step_of(base)

  def run(directory, numbers, anomalies, told=None):
    experiment = dataclasses.replace(base, training=dataclasses.replace(base.training, anomalies=anomalies))
    spec = dataclasses.replace(spec_of(base), experiment=experiment)
    batches = functools.partial(train_batches, training_mixture(corpus, data), data, base.training.batch_size)
    warn = (told if told is not None else []).append
    return Run(spec, poisoned(step, numbers), batches, 6, directory, warn=warn)

  return run


def final_state(run):
  checkpointer = Checkpointer(run.directory / "checkpoints", run.spec.experiment.training.checkpoints)
  _, state, progress = checkpointer.restore_newest(run.spec.abstract_state, lambda text: None)
  checkpointer.close()
  return state, progress


def by_hand(run, numbers):
  """The state after the steps of a run on the batches of these numbers."""
  batches, state, step = run.batches(), run.spec.init_state(0), step_of(tiny(False, data=run.spec.experiment.data))
  every = [next(batches) for _ in range(max(numbers) + 1)]
  for done, number in enumerate(numbers):
    rate = np.float32(learning_rate(run.spec.experiment.optimizer, done, run.steps))
    state, _ = step(state, to_devices(every[number], run.spec.partitioner.batch), rate)
  return state


def test_a_skipped_step_is_counted_and_logged_with_its_batch(start, tmp_path):
  told = []
  run = start(tmp_path, {3}, Anomalies(), told)
  summary = train(run)
  assert summary["skipped_steps"] == 1 and summary["goodput"]["skipped_s"] > 0
  record = read_metrics(tmp_path)[3]
  assert (record["step"], record["skipped"], record["skipped_steps"], record["batch"]) == (4, 1, 1, 3)
  assert told == record["warnings"] and told[0].startswith("the update of step 4 is skipped (loss nan, grad_norm nan; ")
  assert [record["skipped"] for record in read_metrics(tmp_path)] == [0, 0, 0, 1, 0, 0]
  assert final_state(run)[1]["skipped_steps"] == 1


@pytest.mark.parametrize("most", [0, 2])
def test_more_skipped_steps_in_a_row_than_allowed_stop_the_run(start, tmp_path, most):
  numbers = range(2, 3 + most)
  assert train(start(tmp_path / "few", numbers, Anomalies(max_skipped=most + 1)))["skipped_steps"] == most + 1
  with pytest.raises(FloatingPointError, match=r"^loss is nan at step 3\. The latest checkpoint is that of step \d,"):
    train(start(tmp_path / "many", numbers, Anomalies(max_skipped=most)))


def test_a_run_that_does_no_update_at_all_stops(start, tmp_path):
  with pytest.raises(FloatingPointError, match=r"^loss is nan at step 1\."):
    train(start(tmp_path, range(6), Anomalies(max_skipped=100)))


def test_a_rewind_continues_from_the_newest_checkpoint_with_the_data_behind_the_bad(start, tmp_path):
  """Checkpoints are of steps 2 and 4, and the batches of steps 4 and 5 are bad."""
  told = []
  run = start(tmp_path, {3, 4}, Anomalies(max_skipped=1, then="rewind"), told)
  summary = train(run)
  assert summary["skipped_steps"] == 2 and summary["goodput"]["repeated_s"] > 0
  assert any("training continues from step 4" in text for text in told)
  assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
  assert final_state(run)[1]["batch"] == 8  # number 5 had gone to the device by then, and is passed over too


def test_a_rewind_trains_exactly_the_steps_of_the_data_that_is_left(start, tmp_path):
  """The batches of steps 3 and 4 are bad; by then that of step 5 has gone to the device, and is passed over too."""
  run = start(tmp_path, {2, 3}, Anomalies(max_skipped=1, then="rewind"))
  assert train(run)["steps"] == 6
  state, progress = final_state(run)
  first = progress["batch"] - 4
  assert first in (4, 5)
  assert_equal(state, by_hand(run, [0, 1, *range(first, first + 4)]))


def test_a_run_whose_data_stays_bad_stops_after_some_rewinds(start, tmp_path):
  told = []
  with pytest.raises(FloatingPointError, match=r"loss is nan at step 3"):
    train(start(tmp_path, range(2, 1000), Anomalies(max_skipped=1, then="rewind"), told))
  assert sum("training continues from step 2" in text for text in told) == MAX_REWINDS


def test_neither_a_loss_nor_a_gradient_may_be_nan_or_infinite():
  known = Watched((), jnp.float32(3.0), jnp.float32(0.01), jnp.int32(WARMUP_STEPS))
  for spike, loss, norm in itertools.product((None, 4.0), (3.0, np.nan, np.inf, -np.inf), (1.0, np.nan, np.inf)):
    accepted = is_accepted(Anomalies(spike=spike), known, jnp.float32(loss), jnp.float32(norm))
    assert bool(accepted) == (np.isfinite(loss) and np.isfinite(norm)), (spike, loss, norm)


def test_the_statistics_forget_losses_after_some_fifty_steps():
  state = Watched((), jnp.float32(3.0), jnp.float32(0.0), jnp.int32(1000))
  state = with_loss(Anomalies(spike=4.0), state, jnp.float32(4.0))
  np.testing.assert_allclose(state.loss_mean, 3 + 1 / RECENT_STEPS, rtol=1e-6)
  np.testing.assert_allclose(state.loss_variance, (1 / RECENT_STEPS) * (1 - 1 / RECENT_STEPS), rtol=1e-4)


def test_a_spike_is_a_loss_far_above_those_of_recent_steps():
  anomalies, chance = Anomalies(spike=4.0), np.random.default_rng(0)
  zero = jnp.zeros((), jnp.float32)
  state, losses = Watched((), zero, zero, jnp.zeros((), jnp.int32)), 3 + 0.1 * chance.standard_normal(40)
  for number, loss in enumerate(losses):
    spike = is_accepted(anomalies, state, jnp.float32(100.0), jnp.float32(1.0))
    assert bool(spike) == (number < WARMUP_STEPS)
    assert bool(is_accepted(anomalies, state, jnp.float32(loss), jnp.float32(1.0)))
    state = with_loss(anomalies, state, jnp.float32(loss))
  np.testing.assert_allclose(state.loss_mean, losses.mean(), rtol=1e-5)
  np.testing.assert_allclose(state.loss_variance, losses.var(), rtol=1e-4)
  limit = losses.mean() + 4 * losses.std()
  for loss, accepted in ((limit * 0.999, True), (limit * 1.001, False), (0.0, True), (np.nan, False), (np.inf, False)):
    assert bool(is_accepted(anomalies, state, jnp.float32(loss), jnp.float32(1.0))) == accepted


@pytest.mark.slow
def test_with_spikes_watched_other_steps_keep_their_bits():
  experiment = tiny(False)
  watching = dataclasses.replace(
    experiment, training=dataclasses.replace(experiment.training, anomalies=Anomalies(spike=9))
  )
  found = []
  for each in (experiment, watching):
    spec, step = spec_of(each), step_of(each)
    state = spec.init_state(0)
    for seed in range(3):
      batch = jax.device_put(random_batch(each, seed), spec.partitioner.batch)
      state, _ = step(state, batch, jnp.float32(3e-3))
    found.append(state)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found[0].parameters, found[1].parameters)
  assert int(found[1].optimizer.accepted) == 3
