"""Records and files that cannot be read: named, and skipped and counted where data.on_error says so."""

import dataclasses
import gzip
import json
import pathlib
import random
import re

import pytest

from moejax.config import Data
from moejax.data.corpus import build_corpus
from moejax.data.damage import Damaged
from moejax.data.documents import Reading, SourceFile
from moejax.data.mixture import training_mixture
from moejax.data.pack import pack
from moejax.data.pipeline import train_batches
from moejax.data.shards import open_packed
from moejax.data.sources import check_sources, source_parts
from moejax.data.text import open_text
from moejax.data.tokenizer_training import train_tokenizer
from moejax.errors import UserError, users_mistake

GOOD = [f"größer {n} " * (1 + n % 3) for n in range(40)]

# How each format writes a text, and records of it that cannot be read.
LINES = {
  "a.jsonl": (
    lambda text: json.dumps({"text": text}).encode(),
    [b'{"text": "a', b'{"text": "\xff"}', b"[1]", b'{"a": 1}'],
  ),
  "a.csv": (lambda text: f'"{text}",1'.encode(), [b"\xff,1", b"a,1,2", b'a"b",""c,1']),
  "a.tsv": (lambda text: f"{text}\t1".encode(), [b"\xff\t1", b"a\t1\t2"]),
}
HEADS = {"a.jsonl": [], "a.csv": [b"text,n"], "a.tsv": [b"text\tn"]}


def read(path, on_error):
  return [text for text, _ in SourceFile(path.name, path).documents(Reading(on_error=on_error))]


def split(found):
  """The texts, and the messages about what cannot be read."""
  return [text for text in found if not isinstance(text, Damaged)], [str(x) for x in found if isinstance(x, Damaged)]


def write_records(path, seed):
  """Records of which some cannot be read; returns the lines of those."""
  write, bad = LINES[path.name.removesuffix(".gz")]
  draw, bad_lines = random.Random(seed), []
  lines = list(HEADS[path.name.removesuffix(".gz")])
  for text in GOOD:
    while draw.random() < 0.2:
      lines.append(draw.choice(bad))
      bad_lines.append(len(lines))
    lines.append(write(text))
  content = b"\n".join(lines) + b"\n"
  path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
  return bad_lines


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("name", LINES)
def test_records_that_cannot_be_read_are_skipped_and_named_and_all_others_are_read(tmp_path, name, compression):
  path = tmp_path / (name + compression)
  for seed in range(10):
    bad_lines = write_records(path, seed)
    texts, skipped = split(read(path, "skip"))
    assert texts == GOOD
    assert [message.partition(":")[0] for message in skipped] == [f"{path} line {line}" for line in bad_lines]
    if skipped:
      with pytest.raises(Damaged) as caught:
        read(path, "stop")
      assert str(caught.value) == skipped[0]


def test_a_row_that_is_not_utf8_is_skipped_in_every_kind_of_column(tmp_path):
  pa = pytest.importorskip("pyarrow", reason="of the extra `data`")
  parquet = pytest.importorskip("pyarrow.parquet")
  binary = [text.encode() if n not in (7, 23) else b"a\xff" for n, text in enumerate(GOOD)]
  strings = pa.array(binary, pa.binary()).view(pa.string())
  kinds = {
    "plain": strings,
    "large": pa.array(binary, pa.large_binary()).view(pa.large_string()),
    "dictionary": pa.DictionaryArray.from_arrays(pa.array(range(len(GOOD))), strings),
  }
  for kind, values in kinds.items():
    table = pa.table({"text": values})
    parquet.write_table(table, tmp_path / f"{kind}.parquet", row_group_size=7)
    with pa.ipc.new_stream(str(tmp_path / f"{kind}.arrow"), table.schema) as writer:
      writer.write_table(table)
    paths = [tmp_path / f"{kind}.parquet", tmp_path / f"{kind}.arrow"]
    for path in paths[kind == "dictionary" :]:  # Parquet's own reader refuses a dictionary that is not UTF-8
      texts, skipped = split(read(path, "skip"))
      assert texts == [text for n, text in enumerate(GOOD) if n not in (7, 23)], path
      assert [message.partition(";")[0] for message in skipped] == [
        f"{path} row {row}: byte 0xff is not utf-8" for row in (8, 24)
      ]


def folder_with_damage(folder: pathlib.Path) -> None:
  """Files of which one record, the rest of one file and one whole file cannot be read."""
  folder.mkdir()
  for n, text in enumerate(GOOD):
    (folder / f"good-{n:02}.txt").write_text(text)
  (folder / "latin.txt").write_bytes("größe".encode("latin-1"))
  (folder / "record.jsonl").write_bytes(b'{"text": "one"}\n{"text":\n{"text": "two"}\n')
  # Random words, so that some of them come before the end that is cut off.
  words = "\n".join(json.dumps({"text": random.Random(n).randbytes(2**11).hex()}) for n in range(40))
  (folder / "cut.jsonl.gz").write_bytes(gzip.compress(words.encode())[:-100])


def data_of(folder, on_error, **fields):
  return Data(train=(str(folder),), validation_fraction=0.3, sequence_length=8, on_error=on_error, **fields)


def test_what_is_skipped_is_counted_told_again_from_the_cache_and_equal_when_packed(tmp_path):
  folder_with_damage(tmp_path / "text")
  told: list[str] = []
  data = data_of(tmp_path / "text", "skip")
  corpora = [build_corpus(open_text(data), tmp_path / cache, warn=told.append) for cache in ("one", "one", "other")]
  assert len({corpus.summary()["sha256"] for corpus in corpora}) == 1
  assert corpora[0].summary()["skipped"] == 3
  assert len(set(told)) == 1 and len(told) == 3
  assert told[0].startswith("3 unreadable records were skipped (data.on_error=skip): ")
  for name in ("cut.jsonl.gz: damaged gzip", "latin.txt line 1", "record.jsonl line 2"):
    assert name in told[0]
  reading = Reading(on_error="skip")
  kept = {
    keep: pack(
      [str(tmp_path / "text")], "bytes", tmp_path / keep, reading=reading, keep=keep, validation_fraction=0.3,
      processes=1, warn=told.append,
    )
    for keep in ("train", "validation")
  }  # fmt: skip
  assert told[3:] == told[:2]
  for keep, manifest in kept.items():
    assert manifest["skipped"] == 3 and manifest["documents"] == corpora[0].summary()[f"{keep}_documents"]


def test_without_skipping_the_first_is_named_and_nothing_is_cached(tmp_path):
  folder_with_damage(tmp_path / "text")
  with pytest.raises(UserError, match=r"cut\.jsonl\.gz: damaged gzip"):
    build_corpus(open_text(data_of(tmp_path / "text", "stop")), tmp_path / "cache")
  assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").iterdir())


def test_if_nothing_can_be_read_the_error_says_why(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
  with pytest.raises(
    UserError, match=r'has no document with text \(2 unreadable records .*no string "text" \(its fields: body\)'
  ):
    build_corpus(open_text(data_of(tmp_path / "a.jsonl", "skip")), tmp_path / "cache")


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.parquet"])
def test_a_file_that_is_gone_once_it_was_listed_is_named_or_skipped(tmp_path, name):
  if name.endswith(".parquet"):
    pytest.importorskip("pyarrow", reason="of the extra `data`")
  folder = tmp_path / "text"
  folder.mkdir()
  for n, text in enumerate(GOOD):
    (folder / f"a-{n}.txt").write_text(text)
  whole = build_corpus(open_text(data_of(folder, "skip")), tmp_path / "cache").summary()
  for on_error in ("stop", "skip"):
    (folder / name).write_text("to be deleted")
    parts = source_parts(str(folder))
    text = open_text(data_of(folder, "skip"))
    object.__setattr__(text, "data", data_of(folder, on_error))
    object.__setattr__(text, "parts", {str(folder): tuple(parts)})
    (folder / name).unlink()
    if on_error == "stop":
      with pytest.raises(UserError, match=rf"{name} cannot be read \(No such file or directory\)"):
        build_corpus(text, tmp_path / "cache")
    else:
      summary = build_corpus(text, tmp_path / "cache").summary()
      assert summary["sha256"] == whole["sha256"] and summary["skipped"] == 1


def test_a_damaged_first_record_is_found_before_all_is_read_and_skipped_where_it_may_be(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text":\n{"text": "one"}\n')
  with pytest.raises(UserError, match=r"a\.jsonl line 1: not JSON"):
    check_sources(data_of(tmp_path / "a.jsonl", "stop"))
  assert check_sources(data_of(tmp_path / "a.jsonl", "skip"))


def test_a_tokenizer_is_trained_on_what_can_be_read(tmp_path):
  pytest.importorskip("tokenizers", reason="of the extra `data`")
  folder_with_damage(tmp_path / "text")
  told: list[str] = []
  size = train_tokenizer([str(tmp_path / "text")], 300, tmp_path / "tokenizer.json", on_error="skip", warn=told.append)
  assert size == 300 and "3 unreadable records" in told[0]
  with pytest.raises(UserError, match=r"cut\.jsonl\.gz"):
    train_tokenizer([str(tmp_path / "text")], 300, tmp_path / "tokenizer.json")


def test_a_shard_that_is_deleted_or_cut_while_a_run_reads_it_is_named(tmp_path):
  (tmp_path / "text").mkdir()
  for n in range(60):
    (tmp_path / "text" / f"{n}.txt").write_text(f"document {n} " * 300)
  for keep in ("train", "validation"):
    folder, options = tmp_path / keep, {"keep": keep, "validation_fraction": 0.2, "shard_tokens": 2**14}
    pack([str(tmp_path / "text")], "bytes", folder, processes=1, **options)
  data = Data(train=(str(tmp_path / "train"),), validation=(str(tmp_path / "validation"),), sequence_length=64)
  corpus = build_corpus(open_text(data), tmp_path / "cache")
  _, second, *_ = sorted((tmp_path / "train").glob("*.array_record"))
  content = second.read_bytes()
  for harm in (lambda: second.write_bytes(content[:100]), second.unlink):
    second.write_bytes(content)
    corpus = dataclasses.replace(corpus, train=(open_packed(tmp_path / "train", corpus.tokenizer.identity, 256),))
    batches = train_batches(training_mixture(corpus, data), data, 4)
    harm()
    with pytest.raises(UserError) as caught:
      for _ in range(100):
        next(batches)
    assert re.search(rf"{second.name} cannot be read .*pack the text again$", users_mistake(caught.value) or "")
    batches.close()
