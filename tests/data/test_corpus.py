import json
import os
import pathlib
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from moejax.config import Data
from moejax.data import corpus as corpus_module
from moejax.data.corpus import build_corpus
from moejax.data.documents import document_key, is_held_out
from moejax.data.pack import pack
from moejax.data.sources import documents
from moejax.data.text import open_text
from moejax.errors import UserError


@pytest.fixture
def folder(tmp_path):
  """60 documents of text, some of it outside ASCII."""
  folder = tmp_path / "text"
  folder.mkdir()
  for n in range(20):
    (folder / f"{n:02}.txt").write_text(f"Document {n}: " + "größer " * n)
  lines = (json.dumps({"text": f"line {n} " * (n % 7 + 1), "id": n}) for n in range(40))
  (folder / "lines.jsonl").write_text("\n".join(lines))
  return folder


@pytest.fixture
def data(folder):
  return Data(train=(str(folder),), validation_fraction=0.2, sequence_length=8)


@pytest.fixture
def no_tokenizing(monkeypatch):
  """Call it, and tokenizing fails."""

  def fail(*_):
    raise AssertionError("tokenized again")

  return lambda: monkeypatch.setattr(corpus_module, "_tokenize", fail)


def streams(corpus):
  """The one stream of each split."""
  (train,) = corpus.train
  return {"train": train, "validation": corpus.validation}


def texts(corpus, split):
  stream = streams(corpus)[split]
  bounds = zip(stream.starts[:-1], stream.starts[1:], strict=True)
  assert set(stream.tokens[stream.starts[:-1]]) == {corpus.tokenizer.begin}
  return [corpus.tokenizer.decode(stream.tokens[start + 1 : stop]) for start, stop in bounds]


def test_both_streams_hold_the_documents_of_their_split(data, folder, tmp_path):
  corpus = build_corpus(open_text(data), tmp_path / "cache")
  everything = list(documents(str(folder)))
  chosen = [text for text in everything if is_held_out(document_key(text), 0.2)]
  assert texts(corpus, "train") == [text for text in everything if text not in chosen]
  held_out = sorted(chosen, key=document_key)
  assert texts(corpus, "validation") == held_out
  assert 4 <= len(held_out) <= 20
  assert chosen != held_out


def test_validation_sources_are_used_whole_and_train_keeps_all(data, folder, tmp_path):
  other = tmp_path / "other.jsonl"
  other.write_text("\n".join(json.dumps({"text": f"held out {n}"}) for n in range(9)))
  corpus = build_corpus(
    open_text(Data(train=data.train, validation=(str(other),), sequence_length=8)), tmp_path / "cache"
  )
  assert texts(corpus, "train") == list(documents(str(folder)))
  assert texts(corpus, "validation") == sorted(documents(str(other)), key=document_key)


def test_the_summary_counts_both_splits(data, tmp_path):
  corpus = build_corpus(open_text(data), tmp_path / "cache")
  summary = corpus.summary()
  for split in ("train", "validation"):
    split_texts = texts(corpus, split)
    assert summary[f"{split}_documents"] == len(split_texts) == streams(corpus)[split].num_documents
    assert summary[f"{split}_bytes"] == sum(len(text.encode()) for text in split_texts)
    assert summary[f"{split}_tokens"] == len(streams(corpus)[split])
    assert summary[f"{split}_tokens"] == summary[f"{split}_bytes"] + summary[f"{split}_documents"]
  assert json.loads(json.dumps(summary)) == summary


def test_a_second_run_reads_the_cache(data, tmp_path, no_tokenizing):
  first = build_corpus(open_text(data), tmp_path / "cache")
  no_tokenizing()
  second = build_corpus(
    open_text(Data(**{**vars(data), "sequence_length": 16, "seed": 5, "prefetch": 1})), tmp_path / "cache"
  )
  assert second.summary() == first.summary()
  np.testing.assert_array_equal(first.train[0].tokens, second.train[0].tokens)
  assert isinstance(second.train[0].tokens, np.memmap)


def test_the_content_hash_is_of_the_text_and_not_of_the_place(data, folder, tmp_path):
  here = build_corpus(open_text(data), tmp_path / "cache").summary()
  moved = folder.rename(tmp_path / "moved")
  data = Data(**{**vars(data), "train": (str(moved),)})
  assert build_corpus(open_text(data), tmp_path / "cache2").summary() == here
  (moved / "00.txt").write_text("Document 1: ")
  assert build_corpus(open_text(data), tmp_path / "cache2").summary()["sha256"] != here["sha256"]


@pytest.mark.parametrize("change", ["content", "time", "file", "fraction", "tokenizer"])
def test_what_decides_the_streams_makes_another_corpus(data, folder, tmp_path, monkeypatch, change):
  first = build_corpus(open_text(data), tmp_path / "cache")
  match change:
    case "content":
      (folder / "03.txt").write_text("changed")
    case "time":
      os.utime(folder / "03.txt", ns=(0, 0))
    case "file":
      (folder / "20.txt").write_text("new")
    case "fraction":
      data = Data(**{**vars(data), "validation_fraction": 0.3})
    case "tokenizer":
      monkeypatch.setattr("moejax.data.tokenizers.ByteTokenizer.identity", "other")
  assert build_corpus(open_text(data), tmp_path / "cache").folder != first.folder


def test_the_python_version_counts_where_the_standard_library_is_read(data, monkeypatch, tmp_path):
  library = tmp_path / "library"
  library.mkdir()
  for n in range(20):
    (library / f"m{n}.py").write_text(f"x = {n}\n")
  monkeypatch.setattr("moejax.data.sources.sysconfig.get_paths", lambda: {"stdlib": str(library)})
  folders = set()
  for version in ("3.11.0", "3.12.0"):
    monkeypatch.setattr("platform.python_version", lambda version=version: version)
    for train in (("python-standard-library",), data.train):
      folders.add(
        build_corpus(
          open_text(Data(train=train, validation_fraction=0.4, sequence_length=8)), tmp_path / "cache"
        ).folder
      )
  assert len(folders) == 3


def test_an_error_while_reading_leaves_nothing_behind(data, folder, tmp_path):
  (folder / "lines.jsonl").write_text('{"text": "good"}\nbad\n')
  with pytest.raises(UserError, match=r"lines\.jsonl line 2: not JSON"):
    build_corpus(open_text(data), tmp_path / "cache")
  assert list((tmp_path / "cache").iterdir()) == []


def test_a_killed_process_leaves_nothing_that_looks_complete(data, tmp_path):
  program = (
    "import os, pathlib, signal, sys\n"
    "from moejax.config import Data\n"
    "from moejax.data.corpus import build_corpus\n"
    "from moejax.data.text import open_text\n"
    "def kill(what, done):\n"
    "  if done > 0.5: os.kill(os.getpid(), signal.SIGKILL)\n"
    "data = Data(train=(sys.argv[1],), validation_fraction=0.2, sequence_length=8)\n"
    "build_corpus(open_text(data), pathlib.Path(sys.argv[2]), kill)\n"
  )
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  cache = tmp_path / "cache"
  killed = subprocess.run([sys.executable, "-c", program, data.train[0], str(cache)], env=environment, check=False)
  assert killed.returncode == -9
  (left,) = cache.iterdir()
  assert left.name.startswith(".partial-")
  corpus = build_corpus(open_text(data), cache)
  assert corpus.summary()["train_documents"] + corpus.summary()["validation_documents"] == 60
  assert left.exists(), "it may belong to a process that still writes"
  for path in (left, *left.iterdir()):
    os.utime(path, (time.time() - 2 * 86_400,) * 2)
  build_corpus(open_text(Data(**{**vars(data), "validation_fraction": 0.3})), cache)
  assert not left.exists()


def test_of_two_that_tokenize_at_once_one_result_stays(data, tmp_path):
  cache = tmp_path / "cache"
  inner = []

  def second(what, done):
    if not inner:
      inner.append(None)
      inner.append(build_corpus(open_text(data), cache))

  outer = build_corpus(open_text(data), cache, second)
  assert outer.folder == inner[1].folder
  np.testing.assert_array_equal(outer.train[0].tokens, inner[1].train[0].tokens)
  assert [path for path in cache.iterdir() if path.is_dir()] == [outer.folder]


def test_progress_rises_to_one(data, tmp_path):
  calls = []
  build_corpus(open_text(data), tmp_path / "cache", lambda what, done: calls.append((what, done)))
  done = [part for _, part in calls]
  assert done == sorted(done)
  assert done[-1] == 1.0
  assert len(set(done)) > 10
  assert {what for what, _ in calls} == {"tokenizing"}


def test_too_few_documents_for_the_fraction_say_what_to_do(tmp_path):
  path = tmp_path / "one.txt"
  path.write_text("a single document")
  with pytest.raises(UserError, match=r"data\.validation_fraction=0\.05 leaves no document of 1 for validation; set"):
    build_corpus(open_text(Data(train=(str(path),), sequence_length=8)), tmp_path / "cache")


def test_a_source_of_empty_texts_says_what_to_do(data, tmp_path):
  path = tmp_path / "empty.jsonl"
  path.write_text('{"text": ""}\n')
  with pytest.raises(UserError, match=r"data\.validation=.*empty\.jsonl has no document with text"):
    build_corpus(open_text(Data(train=data.train, validation=(str(path),), sequence_length=8)), tmp_path / "cache")
  with pytest.raises(UserError, match=r"data\.train=.*empty\.jsonl has no document with text"):
    build_corpus(open_text(Data(train=(str(path),), sequence_length=8)), tmp_path / "cache")


def test_a_damaged_cache_says_what_to_delete(data, tmp_path):
  corpus = build_corpus(open_text(data), tmp_path / "cache")
  (corpus.folder / "validation.tokens").write_bytes(b"")
  with pytest.raises(UserError, match=r"validation\.tokens is damaged: .*; delete .* and run again"):
    build_corpus(open_text(data), tmp_path / "cache")


def test_memory_does_not_grow_with_the_corpus(tmp_path):
  peaks = []
  for megabytes in (1, 16):
    path = tmp_path / f"{megabytes}.jsonl"
    with path.open("w") as file:
      for n in range(megabytes * 16):
        file.write(json.dumps({"text": f"{n:07} text".ljust(65536, "x")}) + "\n")
    tracemalloc.start()
    build_corpus(open_text(Data(train=(str(path),), validation_fraction=0.2, sequence_length=8)), tmp_path / "cache")
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  # A few documents of 64 kB at a time, as text, int32 ids and bytes; a megabyte is slack.
  assert peaks[1] < peaks[0] + 2**20


def write_lines(path, texts):
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return str(path)


@pytest.mark.parametrize("packed", ["neither", "train", "validation", "both"])
def test_documents_of_both_splits_are_counted_and_warned_of_whatever_is_packed(tmp_path, packed):
  sources = {
    "train": write_lines(tmp_path / "train.jsonl", ["a", "b", "c", "a", "d"]),
    "validation": write_lines(tmp_path / "validation.jsonl", ["d", "e", "a", "f"]),
  }
  for split in sources:
    if packed in (split, "both"):
      pack([sources[split]], "bytes", tmp_path / f"packed-{split}", processes=1)
      sources[split] = str(tmp_path / f"packed-{split}")
  data = Data(train=(sources["train"],), validation=(sources["validation"],), sequence_length=2)
  warnings = []
  for _ in range(2):  # tokenized, and from the cache
    corpus = build_corpus(open_text(data), tmp_path / "cache", warn=warnings.append)
  assert corpus.summary()["validation_in_train"] == 2 and corpus.summary()["train_duplicates"] == 1
  assert len(warnings) == 2 and warnings[0].startswith("2 of 4 validation documents are also in the training")
  assert ("set data.deduplicate" in warnings[0]) == (packed in ("neither", "validation"))


@pytest.mark.parametrize("validation", [True, False])
def test_deduplication_leaves_each_text_once_and_out_of_training_where_it_is_held_out(tmp_path, validation):
  texts = [f"text {n % 30}" for n in range(100)]
  train = (write_lines(tmp_path / "a.jsonl", texts), write_lines(tmp_path / "b.jsonl", texts[:70]))
  held_out = (write_lines(tmp_path / "c.jsonl", ["text 3", "text 3", "other"]),) if validation else ()
  data = Data(train=train, validation=held_out, validation_fraction=0.3, deduplicate=True, sequence_length=8)
  warnings = []
  corpus = build_corpus(open_text(data), tmp_path / "cache", warn=warnings.append)
  if validation:
    assert texts_of_both(corpus) == ([f"text {n}" for n in range(30) if n != 3], ["text 3", "other"])
    assert corpus.summary()["duplicates_dropped"] == 170 - 29 + 1
  else:
    in_train, in_validation = texts_of_both(corpus)
    assert sorted(in_train + in_validation) == sorted(set(texts)) and in_validation
    assert corpus.summary()["duplicates_dropped"] == 140
  assert warnings == [] and corpus.summary()["train_duplicates"] == 0


def texts_of_both(corpus):
  return texts(corpus, "train"), sorted(texts(corpus, "validation"), reverse=True)


def test_deduplication_of_tokens_is_refused_with_the_remedy(data, tmp_path):
  pack(data.train, "bytes", tmp_path / "packed", processes=1)
  packed = Data(train=(*data.train, str(tmp_path / "packed")), deduplicate=True, sequence_length=8)
  with pytest.raises(UserError, match=r"deduplicate=True compares texts, but .*packed contains tokens; .*pack --ded"):
    build_corpus(open_text(packed), tmp_path / "cache")
