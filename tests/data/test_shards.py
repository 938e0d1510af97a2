"""Token shards: what is written, read back, resumed and refused."""

import json

import numpy as np
import pytest

from moejax.data.shards import RECORD_TOKENS, ShardWriter, TokenBlock, is_packed, open_packed, read_manifest
from moejax.errors import UserError

REQUEST = {"tokenizer": "bytes"}
SHARD = 2 * RECORD_TOKENS


def make_blocks(sizes=(700, 1, 5000, 3, 2000, 900), per_block=2, prefixes=False):
  """Documents of these sizes, in blocks."""
  random = np.random.default_rng(0)
  documents = [np.r_[257, random.integers(0, 256, size - 1)] for size in sizes]
  for first in range(0, len(documents), per_block):
    some = documents[first : first + per_block]
    lengths = np.array([len(document) for document in some])
    yield TokenBlock(np.concatenate(some), lengths, lengths // 3 if prefixes else None, first + per_block)


def write(folder, blocks, vocab_size=259, shard_tokens=SHARD):
  writer = ShardWriter(folder, REQUEST, vocab_size, shard_tokens)
  for block in blocks:
    writer.add(block)
  return writer.finish({"text_bytes": 7})


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("vocab_size", "dtype"), [(259, np.uint16), (70_000, np.uint32)])
@pytest.mark.parametrize("shard_tokens", [RECORD_TOKENS, SHARD, 2**20])
def test_slices_are_those_of_the_tokens_written(tmp_path, vocab_size, dtype, shard_tokens):
  blocks = list(make_blocks())
  tokens = np.concatenate([block.tokens for block in blocks])
  manifest = write(tmp_path / "packed", blocks, vocab_size, shard_tokens)
  stream = open_packed(tmp_path / "packed", "bytes", padding=256)
  assert stream.tokens.dtype == dtype and len(stream) == len(tokens) == manifest["tokens"] == 8604
  np.testing.assert_array_equal(stream.starts, np.cumsum([0, 700, 1, 5000, 3, 2000, 900]))
  edges = sorted({0, 1, 699, 700, 8603, 8604, *(edge + d for edge in (1024, 2048, 4096, 8192) for d in (-1, 0, 1))})
  for start in edges:
    for stop in edges:
      if start < stop:
        np.testing.assert_array_equal(stream.tokens[start:stop], tokens[start:stop])
        assert stream.slice(start, stop)[0].dtype == np.int32


def test_shards_have_a_fixed_size_and_the_manifest_counts_them(tmp_path):
  manifest = write(tmp_path / "packed", make_blocks())
  assert [shard["tokens"] for shard in manifest["shards"]] == [2048] * 4 + [8604 - 4 * 2048]
  assert read_manifest(tmp_path / "packed") == manifest
  assert (manifest["documents"], manifest["text_bytes"], manifest["tokenizer"]) == (6, 7, "bytes")
  assert sorted(contents(tmp_path / "packed")) == [
    "keys",
    "manifest.json",
    "starts",
    *(f"tokens-0000{i}.array_record" for i in range(5)),
  ]
  assert is_packed(str(tmp_path / "packed")) and not is_packed(str(tmp_path)) and not is_packed("")


def test_how_documents_fall_into_blocks_makes_no_difference(tmp_path):
  for per_block in (1, 2, 6):
    write(tmp_path / str(per_block), make_blocks(per_block=per_block))
  assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "6")


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("stop_after", range(7))
def test_a_writer_that_died_goes_on_and_writes_the_same(tmp_path, stop_after, prefixes):
  blocks = list(make_blocks(per_block=1, prefixes=prefixes))
  whole = tmp_path / "whole"
  write(whole, blocks)
  died = ShardWriter(tmp_path / "died", REQUEST, 259, SHARD)
  for block in blocks[:stop_after]:
    died.add(block)
  for file in (died._starts, died._prefixes):
    file.flush()  # more has reached the disk than the last progress knows of
  writer = ShardWriter(tmp_path / "died", REQUEST, 259, SHARD)
  done = writer.position or 0
  assert done <= stop_after
  assert done >= (3 if stop_after >= 3 else 0), "the first shards were whole after the third document"
  for block in blocks[done:]:
    writer.add(block)
  writer.finish({"text_bytes": 7})
  assert contents(tmp_path / "died") == contents(whole)


def test_prefixes_come_back_with_their_documents(tmp_path):
  write(tmp_path / "packed", make_blocks(prefixes=True))
  stream = open_packed(tmp_path / "packed", "bytes", padding=256)
  assert stream.prefixes.tolist() == [233, 0, 1666, 1, 666, 300]


def test_what_is_whole_is_not_written_again_and_another_request_is_refused(tmp_path):
  manifest = write(tmp_path / "packed", make_blocks())
  assert ShardWriter(tmp_path / "packed", REQUEST, 259, SHARD).manifest == manifest
  with pytest.raises(
    UserError, match=r"packed was started with a different tokenizer; choose another folder, or delete"
  ):
    ShardWriter(tmp_path / "packed", {"tokenizer": "other"}, 259, SHARD)
  begun = ShardWriter(tmp_path / "begun", REQUEST, 259, SHARD)
  for block in make_blocks():
    begun.add(block)
  with pytest.raises(UserError, match=r"begun was started with a different tokenizer, shard_tokens"):
    ShardWriter(tmp_path / "begun", {"tokenizer": "other"}, 259, 2 * SHARD)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
  (tmp_path / "thesis.tex").touch()
  with pytest.raises(UserError, match=r"is not empty \(it contains thesis\.tex\); choose another folder"):
    ShardWriter(tmp_path, REQUEST, 259, SHARD)
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_sizes_and_empty_sources_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"shard_tokens=1000 is not a multiple of 1024"):
    ShardWriter(tmp_path / "a", REQUEST, 259, 1000)
  with pytest.raises(UserError, match=r"the sources have no documents; use other sources"):
    write(tmp_path / "b", [])


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    ("tokenizer", r"was packed with the tokenizer 'bytes', but data\.tokenizer is 'other'; use the same tokenizer, or"),
    ("shard", r"tokens-00001\.array_record is missing; restore it, or pack the text again"),
    ("starts", r"starts does not match .*manifest\.json: it has 48 bytes instead of 56; copy the folder again"),
    ("format", r"has format 99 instead of 2; pack it again"),
    ("manifest", r"is not a packed folder"),
  ],
)
def test_what_cannot_be_read_says_why(tmp_path, damage, message):
  write(tmp_path, make_blocks())
  manifest = tmp_path / "manifest.json"
  match damage:
    case "shard":
      (tmp_path / "tokens-00001.array_record").unlink()
    case "starts":
      (tmp_path / "starts").write_bytes((tmp_path / "starts").read_bytes()[:-8])
    case "format":
      manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    case "manifest":
      manifest.unlink()
  with pytest.raises(UserError, match=message):
    open_packed(tmp_path, "other" if damage == "tokenizer" else "bytes", padding=256)
