import numpy as np
import pytest

from moejax.data.best_fit import make_plan
from moejax.data.packing import (
  BestFit,
  Concatenated,
  evaluation_window,
  num_evaluation_windows,
  num_targets,
  stack,
)

BEGIN, PADDING = 257, 256


@pytest.fixture
def stream(make_stream):
  """24 tokens; documents open at 0, 4, 6, 7, 15."""
  return make_stream("abc", "d", "", "efghijk", "lmnopqrs")


def every(windows):
  return [windows[index] for index in range(len(windows))]


def test_a_window_with_three_documents(stream):
  window = Concatenated(stream, 8)[0]
  a, b, c, d, e = map(ord, "abcde")
  assert {name: values.tolist() for name, values in window.items()} == {
    "tokens": [BEGIN, a, b, c, BEGIN, d, BEGIN, BEGIN],
    "targets": [a, b, c, BEGIN, d, BEGIN, BEGIN, e],
    "segments": [1, 1, 1, 1, 2, 2, 3, 4],
    "positions": [0, 1, 2, 3, 0, 1, 0, 0],
    "weights": [1, 1, 1, 0, 1, 0, 0, 1],
  }


def test_a_window_that_opens_inside_a_document_counts_from_its_own_start(stream):
  window = evaluation_window(stream, 2, 5, None)
  assert window["tokens"].tolist() == [ord("g"), ord("h"), ord("i"), ord("j"), ord("k")]
  assert window["positions"].tolist() == [0, 1, 2, 3, 4]
  assert window["segments"].tolist() == [1] * 5
  assert window["weights"].tolist() == [1, 1, 1, 1, 0]
  assert window["documents"].tolist() == [3, 3, 3, 3, 4]


def test_types_are_int32_and_weights_float32(stream):
  for window in (
    Concatenated(stream, 8)[0],
    evaluation_window(stream, 2, 9, None),
    evaluation_window(stream, 9, 9, None),
  ):
    types = {name: values.dtype for name, values in window.items()}
    assert types.pop("weights") == np.float32
    assert set(types.values()) == {np.dtype(np.int32)}


@pytest.mark.parametrize("length", range(1, 24))
def test_windows_cover_each_token_but_the_first_once_as_target(stream, length):
  windows = every(Concatenated(stream, length))
  targets = np.concatenate([window["targets"] for window in windows])
  assert len(targets) == 23 // length * length
  np.testing.assert_array_equal(targets, stream.tokens[1 : len(targets) + 1])
  weights = np.concatenate([window["weights"] for window in windows])
  np.testing.assert_array_equal(weights == 0, targets == BEGIN)


@pytest.mark.parametrize("length", [1, 5, 8, 23])
def test_segments_never_join_two_documents_nor_part_one(stream, length):
  document = np.repeat(np.arange(stream.num_documents), np.diff(stream.starts))
  for index, window in enumerate(every(Concatenated(stream, length))):
    of = document[index * length : (index + 1) * length]
    np.testing.assert_array_equal(
      window["segments"][:, None] == window["segments"][None], of[:, None] == of[None]
    )  # fmt: skip
    assert window["segments"].min() == 1
    for segment in np.unique(window["segments"]):
      positions = window["positions"][window["segments"] == segment]
      np.testing.assert_array_equal(positions, np.arange(len(positions)))


@pytest.mark.parametrize("max_tokens", [None, 1, 10, 16, 17, 23, 1000])
@pytest.mark.parametrize("length", [1, 4, 7, 23, 50])
def test_evaluation_scores_the_same_targets_at_every_sequence_length(stream, length, max_tokens):
  count = num_targets(stream, max_tokens)
  assert count == min(23, max_tokens or 23)
  windows = num_evaluation_windows(stream, length, max_tokens)
  batch = stack([evaluation_window(stream, index, length, max_tokens) for index in range(windows)])
  flat = {name: values.reshape(-1) for name, values in batch.items()}
  np.testing.assert_array_equal(flat["targets"][:count], stream.tokens[1 : count + 1])
  np.testing.assert_array_equal(flat["weights"][:count] == 0, stream.tokens[1 : count + 1] == BEGIN)
  np.testing.assert_array_equal(
    flat["documents"][:count], np.repeat(np.arange(5), np.diff(stream.starts))[1 : count + 1]
  )  # fmt: skip
  assert flat["segments"][:count].min() == 1
  padding = {name: set(values[count:].tolist()) for name, values in flat.items()}
  if windows * length > count:
    assert padding == {
      "tokens": {PADDING}, "targets": {PADDING}, "segments": {0}, "positions": {0}, "weights": {0}, "documents": {-1}
    }  # fmt: skip


def test_a_window_beyond_the_last_is_all_padding(stream):
  window = evaluation_window(stream, 3, 8, None)
  assert set(window["segments"]) == {0}
  assert set(window["documents"]) == {-1}
  assert window["weights"].sum() == 0


def test_a_stream_shorter_than_one_sequence_is_refused(stream):
  assert len(Concatenated(stream, 23)) == 1
  with pytest.raises(ValueError, match=r"24 tokens, fewer than the data\.sequence_length \+ 1 = 25 .*use more text"):
    Concatenated(stream, 24)


def test_what_a_prefix_gives_is_not_predicted(make_stream):
  stream = make_stream("abc", "d", "efgh", prefixes=[2, 0, 3])
  window = Concatenated(stream, 10)[0]
  a, b, c, d, e, f, g = map(ord, "abcdefg")
  assert window["targets"].tolist() == [a, b, c, BEGIN, d, BEGIN, e, f, g, ord("h")]
  assert window["weights"].tolist() == [0, 0, 1, 0, 1, 0, 0, 0, 0, 1]
  (batch,) = [evaluation_window(stream, index, 10, None) for index in range(num_evaluation_windows(stream, 10, None))]
  assert batch["weights"].tolist() == window["weights"].tolist()


@pytest.mark.parametrize("length", [1, 3, 8, 50])
@pytest.mark.parametrize("prefixes", [None, [1, 0, 0, 2, 5]])
def test_best_fit_predicts_every_token_but_begins_once_from_its_own_document(make_stream, length, prefixes):
  texts = ("abc", "d", "", "efghijk", "lmnopqrs")
  stream = make_stream(*texts, prefixes=prefixes)
  windows = every(BestFit(stream, length, make_plan(stream.starts, length)))
  predicted = []
  for window in windows:
    assert set(window) == {"tokens", "targets", "segments", "positions", "weights"}
    assert {values.shape for values in window.values()} == {(length,)}
    used = window["segments"] > 0
    assert not used[np.flatnonzero(~used)[:1].sum() if (~used).any() else length :].any(), "padding is at the end"
    assert (window["tokens"][~used] == PADDING).all() and (window["targets"][~used] == PADDING).all()
    assert window["weights"][~used].sum() == 0
    for segment in range(1, window["segments"].max() + 1):
      inside = window["segments"] == segment
      tokens, targets = window["tokens"][inside], window["targets"][inside]
      np.testing.assert_array_equal(tokens[1:], targets[:-1])
      np.testing.assert_array_equal(window["positions"][inside], np.arange(inside.sum()))
      assert BEGIN not in targets and BEGIN not in tokens[1:]
    predicted += window["targets"][window["weights"] > 0].tolist()
  expected = "".join(text[given:] for text, given in zip(texts, prefixes or [0] * 5, strict=True))
  assert sorted(predicted) == sorted(map(ord, expected))


def test_best_fit_keeps_whole_what_fits(make_stream):
  stream = make_stream("abc", "d", "efghijk", "lm")
  windows = every(BestFit(stream, 8, make_plan(stream.starts, 8)))
  rows = [[chr(t) if t < 256 else "|" if t == BEGIN else "." for t in window["tokens"]] for window in windows]
  assert sorted(map("".join, rows)) == ["|ab|l...", "||efghij"]
  assert sum((window["segments"] > 0).sum() for window in windows) == 13
