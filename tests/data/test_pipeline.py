import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from moejax.config import Data
from moejax.data.mixture import Mixture
from moejax.data.packing import Concatenated
from moejax.data.pipeline import batches_by_step, evaluation_batches, num_evaluation_batches, train_batches


@pytest.fixture
def data():
  return Data(sequence_length=8, seed=3, prefetch=3)


@pytest.fixture
def stream(make_stream):
  """321 tokens, no two windows of which are equal: 40 windows of 8."""
  return make_stream(*(np.arange(start, start + 31) % 250 for start in range(0, 300, 31)), np.array([7]))


@pytest.fixture
def mixture(stream):
  return Mixture((Concatenated(stream, 8),))


def assert_equal(left, right):
  assert left.keys() == right.keys()
  for name in left:
    assert left[name].dtype == right[name].dtype
    np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def take(iterator, count):
  batches = [next(iterator) for _ in range(count)]
  iterator.close()
  return batches


def windows_of(batches, stream, length):
  """Index of the window that each row of `batches` is."""
  every = Concatenated(stream, length)
  windows = [every[index] for index in range(len(every))]
  index = {window["tokens"].tobytes() + window["targets"].tobytes(): i for i, window in enumerate(windows)}
  assert len(index) == len(windows)
  rows = [
    (tokens, targets) for batch in batches for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True)
  ]
  return [index[tokens.tobytes() + targets.tobytes()] for tokens, targets in rows]


def test_a_batch_has_the_arrays_of_a_window_stacked(stream, mixture, data):
  (batch,) = take(train_batches(mixture, data, 4), 1)
  (first, *_) = windows_of([batch], stream, 8)
  assert {name: values.shape for name, values in batch.items()} == dict.fromkeys(
    ("tokens", "targets", "segments", "positions", "weights"), (4, 8)
  )
  assert_equal({name: values[0] for name, values in batch.items()}, Concatenated(stream, 8)[first])


def test_every_epoch_has_every_window_once_in_another_order(stream, mixture, data):
  # 40 windows in batches of 6: batches straddle epochs.
  order = windows_of(take(train_batches(mixture, data, 6), 20), stream, 8)
  epochs = [order[start : start + 40] for start in (0, 40, 80)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(40))
    assert epoch != sorted(epoch)
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_seed_alone_decides_the_order(stream, mixture, data):
  def order(seed, steps=20):
    return windows_of(take(train_batches(mixture, Data(sequence_length=8, seed=seed), 4), steps), stream, 8)

  assert order(3) == order(3)
  assert order(3, 10) != order(4, 10)
  # Epoch 1 of one seed must not be epoch 0 of the next.
  assert order(3)[40:] != order(4)[:40]
  assert len(order(-1, 1)) == len(order(2**40, 1)) == 4


def test_the_batch_of_a_step_is_what_the_iterator_yields(mixture, data):
  for step, batch in enumerate(take(train_batches(mixture, data, 4), 12)):
    assert_equal(batch, batches_by_step(mixture, data, 4)[step])


@pytest.mark.parametrize("rows", [range(4), range(4, 8), [0, 1, 6, 7], [5]])
def test_a_process_reads_its_rows_of_the_batch(mixture, data, rows):
  for step, share in enumerate(take(train_batches(mixture, data, 8, rows), 7)):
    whole = batches_by_step(mixture, data, 8)[step]
    assert_equal(share, {name: values[list(rows)] for name, values in whole.items()})


def test_resuming_at_every_step_is_bit_equal(mixture, data):
  straight = take(train_batches(mixture, data, 4), 14)
  iterator = train_batches(mixture, data, 4)
  states = [json.loads(json.dumps(iterator.get_state()))]
  for _ in range(12):
    next(iterator)
    states.append(json.loads(json.dumps(iterator.get_state())))
  iterator.close()
  for step, state in enumerate(states):
    resumed, started = train_batches(mixture, data, 4), train_batches(mixture, data, 4, start_step=step)
    next(resumed)  # a state replaces whatever was read before
    resumed.set_state(state)
    for batch, after_state, after_start in zip(straight[step:], take(resumed, 2), take(started, 2), strict=False):
      assert_equal(batch, after_state)
      assert_equal(batch, after_start)


def test_batches_are_read_ahead_by_threads(stream, data):
  readers, all_read = [], threading.Event()

  class Watched:
    def __getattr__(self, name):
      return getattr(stream, name)

    def __len__(self):
      return len(stream)

    def slice(self, start, stop):
      readers.append(threading.current_thread())
      if len(readers) == 1 + data.prefetch:
        all_read.set()
      return stream.slice(start, stop)

  iterator = train_batches(Mixture((Concatenated(Watched(), 8),)), data, 1)
  assert not readers
  next(iterator)
  assert all_read.wait(timeout=30), "one batch asked for, and data.prefetch more are not read"
  assert threading.main_thread() not in readers
  iterator.close()


def test_a_program_that_leaves_its_iterator_open_ends():
  program = (
    "import numpy as np\n"
    "from moejax.config import Data\n"
    "from moejax.data.mixture import Mixture\n"
    "from moejax.data.packing import Concatenated\n"
    "from moejax.data.pipeline import train_batches\n"
    "from moejax.data.token_stream import TokenStream\n"
    "stream = TokenStream(np.full(65_537, 7, np.uint16), np.array([0, 65_537]), 256)\n"
    "mixture = Mixture((Concatenated(stream, 8),))\n"
    "kept = train_batches(mixture, Data(sequence_length=8, prefetch=64), 64)\n"
    "print(next(kept)['tokens'].sum())\n"
  )
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "TF_CPP_MIN_LOG_LEVEL": "3"}
  result = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60, check=True
  )
  assert result.stdout.strip() == str(64 * 8 * 7)
  assert result.stderr == ""


@pytest.mark.parametrize("max_tokens", [None, 100, 64, 1])
def test_evaluation_scores_the_first_targets_once_in_full_batches(stream, max_tokens):
  batches = list(evaluation_batches(stream, 16, 3, max_tokens))
  assert len(batches) == num_evaluation_batches(stream, 16, 3, max_tokens)
  assert {values.shape for batch in batches for values in batch.values()} == {(3, 16)}
  targets = np.concatenate([batch["targets"].reshape(-1) for batch in batches])
  scored = np.concatenate([batch["weights"].reshape(-1) for batch in batches]) > 0
  first = stream.tokens[1 : 1 + (max_tokens or len(stream))]
  np.testing.assert_array_equal(targets[scored], first[first != 257])


def test_rows_that_fill_the_last_evaluation_batch_are_empty(stream):
  *_, last = evaluation_batches(stream, 16, 8, 16 * 9 + 1)
  assert (last["segments"] > 0).sum(axis=1).tolist() == [16, 1, 0, 0, 0, 0, 0, 0]
  assert set(last["documents"][2:].reshape(-1)) == {-1}
  assert last["weights"][2:].sum() == 0
