"""`moejax data pack`: parallel, continued, split."""

import contextlib
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moejax.config import Data
from moejax.data.corpus import build_corpus
from moejax.data.documents import document_key, is_held_out
from moejax.data.pack import pack
from moejax.data.shards import RECORD_TOKENS, open_packed
from moejax.data.sources import documents
from moejax.data.text import open_text
from moejax.data.tokenizers import ByteTokenizer
from moejax.errors import UserError

TOKENIZER = ByteTokenizer()


@pytest.fixture
def folder(tmp_path):
  """60 documents in five files, 5 MB in all."""
  folder = tmp_path / "text"
  folder.mkdir()
  for n in range(4):
    lines = (json.dumps({"text": f"{n} {i} größer " * (i * 400)}) for i in range(1, 16))
    (folder / f"{n}.jsonl").write_text("\n".join(lines))
  (folder / "short.txt").write_text("short")
  return folder


def texts(packed):
  stream = open_packed(packed, TOKENIZER.identity, TOKENIZER.padding)
  bounds = zip(stream.starts[:-1], stream.starts[1:], strict=True)
  found = [stream.tokens[start:stop] for start, stop in bounds]
  assert {int(tokens[0]) for tokens in found} == {TOKENIZER.begin}
  return [TOKENIZER.decode(tokens[1:]) for tokens in found]


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_processes_make_no_difference_and_every_document_is_there(folder, tmp_path):
  for processes in (1, 2):
    pack([str(folder)], "bytes", tmp_path / f"packed{processes}", processes=processes, shard_tokens=2**19)
  assert contents(tmp_path / "packed1") == contents(tmp_path / "packed2")
  everything = list(documents(str(folder)))
  assert texts(tmp_path / "packed1") == everything


def test_the_manifest_counts_and_hashes(folder, tmp_path):
  manifest = pack([str(folder)], "bytes", tmp_path / "packed", processes=1)
  everything = list(documents(str(folder)))
  assert manifest["documents"] == len(everything) == 61
  assert manifest["text_bytes"] == sum(len(text.encode()) for text in everything)
  assert manifest["tokens"] == manifest["text_bytes"] + 61
  assert manifest["tokenizer"] == TOKENIZER.identity and manifest["vocab_size"] == 259
  assert [(source["name"], source["documents"]) for source in manifest["sources"]] == [
    ("0.jsonl", 15), ("1.jsonl", 15), ("2.jsonl", 15), ("3.jsonl", 15), ("short.txt", 1)
  ]  # fmt: skip
  before = [source["sha256"] for source in manifest["sources"]]
  (folder / "short.txt").write_text("shorn")
  after = [source["sha256"] for source in pack([str(folder)], "bytes", tmp_path / "again", processes=1)["sources"]]
  assert before[:4] == after[:4] and before[4] != after[4] and len(set(before)) == 5


@pytest.mark.parametrize("options", [{}, {"deduplicate": True}, {"keep": "train", "deduplicate": True}])
def test_a_pack_that_stopped_anywhere_goes_on_to_the_same_shards(tmp_path, options):
  text = tmp_path / "text"
  text.mkdir()
  for n in range(3):
    lines = (json.dumps({"text": f"{(n + i) % 17} größer " * 9000}) for i in range(30))
    (text / f"{n}.jsonl").write_text("\n".join([*lines, json.dumps({"text": None})]))
  options |= {"processes": 1, "shard_tokens": 2**19}
  whole = pack([str(text)], "bytes", tmp_path / "whole", **options)
  assert whole["nulls"] == 3 and len(whole["shards"]) > 2
  stops = 0
  for after in (1, 2, 3, 5, 8):
    calls = iter(range(after))
    with contextlib.suppress(RuntimeError):
      stop = functools.partial(stop_at_end, calls)
      pack([str(text)], "bytes", tmp_path / f"stopped{after}", progress=stop, **options)
    stops += not (tmp_path / f"stopped{after}" / "manifest.json").exists()
    assert pack([str(text)], "bytes", tmp_path / f"stopped{after}", **options) == whole
    assert contents(tmp_path / f"stopped{after}") == contents(tmp_path / "whole")
  assert stops


def stop_at_end(calls, *_):
  if next(calls, None) is None:
    raise RuntimeError("stopped")


def test_deduplicated_packing_keeps_the_first_of_each_text(folder, tmp_path):
  everything = list(documents(str(folder)))
  manifest = pack([str(folder), str(folder / "1.jsonl")], "bytes", tmp_path / "packed", deduplicate=True, processes=2)
  assert texts(tmp_path / "packed") == everything and manifest["documents"] == 61
  assert [source["documents"] for source in manifest["sources"]] == [15, 15, 15, 15, 1, 15]


def test_a_killed_pack_goes_on_without_tokenizing_again_what_is_whole(folder, tmp_path):
  program = (
    "import pathlib, sys\n"
    "from moejax.data.pack import pack\n"
    "if __name__ == '__main__':\n"
    "  show = lambda what, done: print(done, flush=True)\n"
    "  pack([sys.argv[1]], 'bytes', pathlib.Path(sys.argv[2]), processes=2, shard_tokens=2**19, progress=show)\n"
  )
  (tmp_path / "program.py").write_text(program)
  packed = tmp_path / "packed"
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  command = [sys.executable, str(tmp_path / "program.py"), str(folder), str(packed)]
  process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
  assert process.stdout
  while float(process.stdout.readline()) < 0.5:
    pass
  children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  deadline = time.monotonic() + 30
  while any(_runs(child) for child in children):
    assert time.monotonic() < deadline, "processes of the pool outlive their parent"
    time.sleep(0.05)
  assert not (packed / "manifest.json").exists() and (packed / "progress.json").exists()
  shards = {path: path.stat().st_mtime_ns for path in packed.glob("tokens-*.array_record")}
  assert shards
  done = []
  pack([str(folder)], "bytes", packed, processes=1, shard_tokens=2**19, progress=lambda what, part: done.append(part))
  assert min(done) > 0.2
  assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in shards.items())
  pack([str(folder)], "bytes", tmp_path / "whole", processes=1, shard_tokens=2**19)
  assert contents(packed) == contents(tmp_path / "whole")


def _runs(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


def test_changed_sources_do_not_continue_what_was_begun_with_others(folder, tmp_path):
  pack([str(folder)], "bytes", tmp_path / "packed", processes=1)
  with pytest.raises(UserError, match="started with a different keep; choose another folder"):
    pack([str(folder)], "bytes", tmp_path / "packed", keep="train", processes=1)
  (folder / "short.txt").write_text("longer")
  with pytest.raises(UserError, match="started with a different sources_sha256; choose another folder"):
    pack([str(folder)], "bytes", tmp_path / "packed", processes=1)


def test_what_is_packed_does_not_go_where_the_source_would_read_it(folder):
  with pytest.raises(UserError, match=r"--out .*packed is inside the source .*; choose a directory outside the source"):
    pack([str(folder)], "bytes", folder / "packed", processes=1)
  assert not (folder / "packed").exists()


def test_both_sides_of_the_split_are_those_that_an_experiment_would_make(folder, tmp_path):
  for keep in ("train", "validation"):
    pack([str(folder)], "bytes", tmp_path / keep, keep=keep, validation_fraction=0.3, processes=1)
  everything = list(documents(str(folder)))
  held_out = sorted((text for text in everything if is_held_out(document_key(text), 0.3)), key=document_key)
  assert texts(tmp_path / "train") == [text for text in everything if text not in held_out]
  assert texts(tmp_path / "validation") == held_out
  packed = Data(train=(str(tmp_path / "train"),), validation=(str(tmp_path / "validation"),), sequence_length=8)
  text = Data(train=(str(folder),), validation_fraction=0.3, sequence_length=8)
  of_packed, of_text = (build_corpus(open_text(data), tmp_path / "cache") for data in (packed, text))
  for a, b in zip((*of_packed.train, of_packed.validation), (*of_text.train, of_text.validation), strict=True):
    np.testing.assert_array_equal(a.starts, b.starts)
    np.testing.assert_array_equal(a.tokens[0 : len(a)], b.tokens[0 : len(b)])
  names = [f"{split}_{what}" for split in ("train", "validation") for what in ("documents", "tokens", "bytes")]
  assert [of_packed.summary()[name] for name in names] == [of_text.summary()[name] for name in names]


def test_a_bad_source_is_named_and_leaves_nothing_that_looks_whole(folder, tmp_path):
  (folder / "9.jsonl").write_text("no JSON\n")
  with pytest.raises(UserError, match=r"9\.jsonl line 1: not JSON"):
    pack([str(folder)], "bytes", tmp_path / "packed", processes=2, shard_tokens=RECORD_TOKENS)
  assert not (tmp_path / "packed" / "manifest.json").exists()


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"processes": 0}, "processes=0 must be at least 1"),
    ({"processes": -1}, "processes=-1"),
    ({"keep": "train", "validation_fraction": 2.0}, "validation_fraction=2.0 must be above 0 and at most 0.5"),
    ({"keep": "validation", "validation_fraction": 0.0}, "to keep validation"),
    ({"keep": "validation", "validation_fraction": float("nan")}, "validation_fraction=nan"),
  ],
)
def test_impossible_options_are_refused(folder, tmp_path, options, said):
  with pytest.raises(UserError, match=re.escape(said)):
    pack([str(folder)], "bytes", tmp_path / "out", **options)
  assert not (tmp_path / "out").exists()
