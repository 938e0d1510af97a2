"""Streams that are mixed."""

import json

import numpy as np
import pytest

from moejax.config import Data
from moejax.data.corpus import Corpus, build_corpus
from moejax.data.mixture import Mixture, training_mixture
from moejax.data.pack import pack
from moejax.data.packing import BestFit, Concatenated
from moejax.data.pipeline import batches_by_step, train_batches
from moejax.data.text import open_text
from moejax.data.tokenizers import ByteTokenizer
from moejax.errors import UserError


@pytest.fixture
def streams(make_stream):
  """Three streams of one document each, all of whose tokens are the stream's own; 40, 10 and 3 windows of 8."""
  return tuple(make_stream(np.full(8 * windows, n)) for n, windows in enumerate((40, 10, 3)))


def mixture_of(streams, weights=()):
  return Mixture(tuple(Concatenated(stream, 8) for stream in streams), weights)


def sources(mixture, data, steps, batch_size=6):
  """Which stream each row of the first batches is from."""
  iterator = train_batches(mixture, data, batch_size)
  rows = np.concatenate([next(iterator)["targets"][:, -1] for _ in range(steps)])
  iterator.close()
  return rows


@pytest.fixture
def data():
  return Data(sequence_length=8, seed=1)


def test_without_weights_an_epoch_has_every_window_of_every_stream_once(streams, data):
  rows = sources(mixture_of(streams), data, 53, batch_size=2)
  for epoch in (rows[:53], rows[53:]):
    assert np.bincount(epoch).tolist() == [40, 10, 3]
  assert rows[:40].tolist() != [0] * 40, "streams are shuffled together"


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(1.0, 1.0, 2.0), (0.5, 0.3, 0.2), (7.0, 90.0, 3.0)])
def test_weights_are_the_shares_of_any_stretch_of_rows(streams, data, weights):
  rows = sources(mixture_of(streams, weights), data, 100)
  shares = np.array(weights) / sum(weights)
  # Proportions are whole numbers of at least 100 to grain: a per cent of each. A stretch is off by a row or two.
  for stretch in (rows, rows[:300], rows[250:450]):
    np.testing.assert_allclose(np.bincount(stretch, minlength=3), len(stretch) * shares, rtol=0.01, atol=2)


def test_every_stream_has_epochs_of_its_own(make_stream, data):
  """The small stream is repeated, shuffled anew, while the large one goes on."""
  small = make_stream(np.arange(8 * 5))
  large = make_stream(np.full(8 * 100, 99))
  mixture = mixture_of((small, large), (1.0, 1.0))
  rows = np.concatenate([batches_by_step(mixture, data, 4)[step]["tokens"] for step in range(10)])
  order = [row[0] for row in rows.tolist() if row[-1] != 99]
  assert len(order) == 20
  epochs = [order[start : start + 5] for start in range(0, 20, 5)]
  assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1 and len(set(epochs[0])) == 5
  assert len({tuple(epoch) for epoch in epochs}) > 1


def test_streams_of_one_length_are_shuffled_each_in_its_own_order(make_stream, data):
  """With one order for all, window n of one source would always stand beside window n of the others."""
  one, other = make_stream(np.arange(8 * 20)), make_stream(np.arange(8 * 20) + 1000)
  mixture = mixture_of((one, other), (1.0, 1.0))
  rows = np.concatenate([batches_by_step(mixture, data, 4)[step]["tokens"][:, -1] for step in range(10)])
  orders = [rows[rows < 1000], rows[rows >= 1000] - 1000]
  assert len(set(orders[0].tolist())) == len(set(orders[1].tolist())) == 20
  assert orders[0].tolist() != orders[1].tolist()


@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 0.5)])
def test_the_seed_and_the_step_alone_decide_on_any_number_of_processes(streams, data, weights):
  mixture = mixture_of(streams, weights)
  straight = train_batches(mixture, data, 8)
  states, batches = [], []
  for _ in range(30):
    states.append(json.loads(json.dumps(straight.get_state())))
    batches.append(next(straight))
  straight.close()
  for step in (0, 7, 29):
    parts = [train_batches(mixture, data, 8, range(2 * process, 2 * process + 2)) for process in range(4)]
    for part in parts:
      part.set_state(states[step])  # of a run on one process
    shares = [next(part) for part in parts]
    for part in parts:
      part.close()
    for name, values in batches[step].items():
      np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), values)
      np.testing.assert_array_equal(batches_by_step(mixture, data, 8)[step][name], values)
  other = Data(sequence_length=8, seed=2)
  assert any((batches_by_step(mixture, other, 8)[step]["tokens"] != batches[step]["tokens"]).any() for step in range(9))


@pytest.fixture
def folder(tmp_path):
  """Two sources of lines, one of which is packed too."""
  for name, count in (("a", 30), ("b", 60)):
    lines = (json.dumps({"text": f"{name} {n} " * 5}) for n in range(count))
    (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
  (tmp_path / "v.jsonl").write_text(json.dumps({"text": "held out"}))
  pack([str(tmp_path / "b.jsonl")], "bytes", tmp_path / "packed", processes=1)
  return tmp_path


def corpus_of(folder, *train, **fields):
  fields.setdefault("validation", (str(folder / "v.jsonl"),))
  data = Data(train=tuple(str(folder / name) for name in train), sequence_length=8, **fields)
  return build_corpus(open_text(data), folder / "cache"), data


def texts(stream):
  bounds = zip(stream.starts[:-1], stream.starts[1:], strict=True)
  return [ByteTokenizer().decode(stream.tokens[start + 1 : stop]) for start, stop in bounds]


def test_with_weights_every_entry_is_a_stream_and_without_all_text_is_one(folder):
  a, b = [f"a {n} " * 5 for n in range(30)], [f"b {n} " * 5 for n in range(60)]
  weighted, _ = corpus_of(folder, "a.jsonl", "b.jsonl", "packed", weights=(1.0, 2.0, 3.0))
  assert [texts(stream) for stream in weighted.train] == [a, b, b] and weighted.weights == (1.0, 2.0, 3.0)
  pooled, _ = corpus_of(folder, "a.jsonl", "packed", "b.jsonl")
  assert sorted(map(texts, pooled.train)) == sorted([b, a + b]) and pooled.weights == ()
  for corpus, documents in ((weighted, 150), (pooled, 150)):
    assert corpus.summary()["train_documents"] == documents
    assert corpus.summary()["train_tokens"] == sum(map(len, corpus.train))
    assert corpus.summary()["train_bytes"] == sum(len(text) for stream in corpus.train for text in texts(stream))
  assert weighted.summary()["sha256"] != pooled.summary()["sha256"]


def test_documents_are_held_out_of_every_text_with_weights_too(folder):
  corpus, _ = corpus_of(folder, "a.jsonl", "b.jsonl", weights=(1.0, 1.0), validation=(), validation_fraction=0.3)
  everything, _ = corpus_of(folder, "a.jsonl", "b.jsonl", validation=(), validation_fraction=0.3)
  assert texts(corpus.validation) == texts(everything.validation)
  assert [text for stream in corpus.train for text in texts(stream)] == texts(everything.train[0])


def test_weights_do_not_make_another_corpus_but_another_packed_folder_does(folder):
  first, _ = corpus_of(folder, "a.jsonl", "packed", weights=(1.0, 2.0))
  again, _ = corpus_of(folder, "a.jsonl", "packed", weights=(5.0, 2.0))
  assert again.folder == first.folder
  pack([str(folder / "a.jsonl")], "bytes", folder / "other", processes=1)
  assert corpus_of(folder, "a.jsonl", "other", weights=(1.0, 2.0))[0].folder != first.folder


def test_what_cannot_be_mixed_says_why(folder):
  with pytest.raises(UserError, match=r"data\.train has no text to hold out; set data\.validation to a folder packed"):
    corpus_of(folder, "packed", validation=())
  with pytest.raises(UserError, match=r"data\.validation mixes text \('.*v\.jsonl'\) and packed tokens; use one"):
    corpus_of(folder, "a.jsonl", validation=(str(folder / "packed"), str(folder / "v.jsonl")))
  with pytest.raises(UserError, match=r"is more than one packed source; pack all of it into one folder"):
    corpus_of(folder, "a.jsonl", validation=(str(folder / "packed"),) * 2)
  (folder / "empty.jsonl").write_text('{"text": ""}\n')
  with pytest.raises(UserError, match=r"data\.train=.*empty\.jsonl has no document with text; use other sources"):
    corpus_of(folder, "a.jsonl", "empty.jsonl", weights=(1.0, 1.0))


def test_another_tokenizer_than_the_packed_folders_is_refused(folder, monkeypatch):
  monkeypatch.setattr("moejax.data.tokenizers.ByteTokenizer.identity", "other")
  with pytest.raises(UserError, match=r"was packed with the tokenizer 'bytes: .*', but data\.tokenizer is 'other'"):
    corpus_of(folder, "packed")


@pytest.mark.parametrize(("packing", "kind"), [("concatenate", Concatenated), ("best_fit", BestFit)])
def test_the_experiment_chooses_the_packing_of_every_stream(folder, packing, kind):
  corpus, data = corpus_of(folder, "a.jsonl", "packed", weights=(1.0, 1.0), packing=packing)
  mixture = training_mixture(corpus, data)
  assert [type(windows) for windows in mixture.windows] == [kind, kind] and mixture.weights == (1.0, 1.0)
  # What a stream on disk and the same stream packed give is the same.
  plain, _ = corpus_of(folder, "b.jsonl", packing=packing)
  (windows,) = training_mixture(plain, data).windows
  for index in range(len(windows)):
    for name, values in windows[index].items():
      np.testing.assert_array_equal(mixture.windows[1][index][name], values)


def test_too_little_text_is_refused_before_the_first_batch(make_stream, data, tmp_path):
  corpus = Corpus((make_stream("ab"),), (), make_stream("ab"), ByteTokenizer(), tmp_path)
  with pytest.raises(UserError, match=r"3 tokens, fewer than the data\.sequence_length \+ 1 = 9"):
    training_mixture(corpus, data)
  with pytest.raises(UserError, match=r"the training text has no document of more than one token"):
    training_mixture(
      Corpus((make_stream("", ""),), (), make_stream("ab"), ByteTokenizer(), tmp_path / "other"),
      Data(sequence_length=8, packing="best_fit"),
    )
