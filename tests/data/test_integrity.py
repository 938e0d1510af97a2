"""Tokens that are damaged on disk are named, whatever the damage; what is read is exactly what was written."""

import json
import os
import random
import shutil

import numpy as np
import pytest

from moejax.config import Data
from moejax.data.corpus import build_corpus
from moejax.data.pack import pack
from moejax.data.shards import ShardWriter, TokenBlock
from moejax.data.text import open_text
from moejax.errors import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A packed folder of several shards, and a corpus of it and of text; tests damage copies."""
  folder = tmp_path_factory.mktemp("written")
  (folder / "text").mkdir()
  for n in range(20):
    (folder / "text" / f"{n:02}.txt").write_text(f"document {n} " * 120)
  (folder / "validation.txt").write_text("some held-out text " * 50)
  pack([str(folder / "text")], "bytes", folder / "packed", processes=1, shard_tokens=4096)
  shutil.copytree(folder / "text", folder / "more")
  return folder


@pytest.fixture
def copy(written, tmp_path):
  return shutil.copytree(written, tmp_path / "copy")


def read(folder):
  """All tokens of a corpus of packed and plain text."""
  sources = (str(folder / "packed"), str(folder / "more"))
  data = Data(train=sources, validation=(str(folder / "validation.txt"),), sequence_length=8)
  corpus = build_corpus(open_text(data), folder / "cache")
  streams = [*corpus.train, corpus.validation]
  return [stream.tokens[0 : len(stream)].tolist() for stream in streams] + [corpus.summary()]


def flip(path, chance):
  content = bytearray(path.read_bytes())
  content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
  path.write_bytes(content)


def truncate(path, chance):
  path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def overwrite(path, chance):
  path.write_bytes(chance.randbytes(path.stat().st_size))


def empty(path, chance):
  path.write_bytes(b"")


def remove(path, chance):
  path.unlink()


def other_json(path, chance):
  path.write_text(chance.choice(["null", "[]", "{}", "7", '"text"', '{"format": 2}', '{"format": 2, "shards": [3]}']))


@pytest.mark.parametrize("damage", [flip, truncate, overwrite, empty, remove, other_json])
def test_whatever_is_damaged_what_is_read_is_what_was_written_or_an_error_names_it(damage, copy):
  chance, expected = random.Random(damage.__name__), read(copy)
  files = [path for folder in ("packed", "cache") for path in sorted((copy / folder).rglob("*")) if path.is_file()]
  for path in files:
    before, times = path.read_bytes(), os.stat(path)
    damage(path, chance)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + chance.randrange(1, 10**9))) if path.exists() else None
    try:
      assert read(copy) == expected, path
      assert not path.name.endswith((".tokens", "starts", "summary.json")), path
    except UserError as error:
      named = path if path.name != "summary.json" else path.parent
      assert "\n" not in str(error) and str(named if path.name != "manifest.json" else path.parent) in str(error)
    path.write_bytes(before)


def test_shards_that_changed_places_are_named(copy):
  first, second = (copy / "packed" / f"tokens-0000{n}.array_record" for n in (0, 1))
  for before in (False, True):
    if before:
      read(copy)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(UserError, match=r"tokens-00000\.array_record is damaged: its content does not match its hash"):
      read(copy)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def test_ids_beyond_the_vocabulary_are_named(tmp_path, written):
  writer = ShardWriter(tmp_path / "packed", {"tokenizer": "bytes: 256 padding begin end"}, 259, 4096)
  tokens = np.full(5000, 300)
  tokens[0] = 257
  writer.add(TokenBlock(tokens, np.array([5000]), None, None))
  writer.finish({})
  data = Data(train=(str(tmp_path / "packed"),), validation=(str(written / "validation.txt"),), sequence_length=8)
  with pytest.raises(UserError, match=r"tokens-00000\.array_record has the id 300, but the tokenizer has 259 tokens"):
    build_corpus(open_text(data), tmp_path / "cache")


def test_a_file_that_has_not_changed_is_read_once(copy, monkeypatch):
  read(copy)
  known = json.loads((copy / "cache" / "verified.json").read_text())
  assert {path.rpartition("/")[2] for path in known} > {"tokens-00000.array_record", "starts", "train.tokens"}
  monkeypatch.setattr("moejax.data.corpus.file_hash", None)  # calling it would fail
  read(copy)


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "tokens-0.txt", ""])
def test_a_manifest_names_only_shards_beside_it(name, copy):
  path = copy / "packed" / "manifest.json"
  manifest = json.loads(path.read_text())
  del manifest["checksum"]
  manifest["shards"][0]["file"] = name
  path.write_text(json.dumps(manifest))
  with pytest.raises(UserError, match=r"manifest\.json is damaged: a shard is"):
    read(copy)
