"""What holds for every kind of source: the same documents give the same tokens, and what is damaged is one line."""

import csv
import functools
import gzip
import json
import random
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moejax.config import Data
from moejax.data.corpus import build_corpus
from moejax.data.damage import Damaged
from moejax.data.documents import Reading, SourceFile, document_key, is_held_out, reading_of
from moejax.data.pack import pack
from moejax.data.sources import check_sources, documents
from moejax.data.text import open_text
from moejax.errors import UserError

pa = pytest.importorskip("pyarrow", reason="of the extra `data`")
parquet = pytest.importorskip("pyarrow.parquet")

ALPHABET = "ab \n\t\"',;\\{}[]:.<|>äß漢🙂\u2028\x00\r"


def make_documents(seed: int, count: int = 40) -> list[str]:
  """Texts with everything that a format must quote, some of them twice."""
  draw = random.Random(seed)
  texts = ["".join(draw.choices(ALPHABET, k=draw.randint(1, 60))) + str(n) for n in range(count)]
  return texts + draw.choices(texts, k=5)


def json_lines(path, texts):
  path.write_text("".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts)))


def json_lines_raw(path, texts):
  lines = (json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in texts)
  path.write_bytes(b"\xef\xbb\xbf\n" + "".join(lines).encode())


def json_array(path, texts):
  path.write_text(json.dumps([{"text": text, "n": [1, {"a": None}]} for text in texts], indent=1))


def nested(path, texts):
  path.write_text("".join(json.dumps({"text": 3, "a": {"b": {"c": text}}}) + "\n" for text in texts))


def table(path, texts):
  with path.open("w", newline="") as file:
    writer = csv.writer(file, "excel-tab" if ".tsv" in path.name else "excel")
    writer.writerows([["n", "text"], *enumerate(texts)])


def column(texts, kind):
  match kind:
    case "dictionary":
      return pa.array(texts).dictionary_encode()
    case "large":
      return pa.array(texts, pa.large_string())
    case "nested":
      return pa.array([{"x": 1, "b": text} for text in texts])
    case _:
      return pa.array(texts)


def write_parquet(path, texts, kind="plain"):
  parquet.write_table(pa.table({"n": range(len(texts)), "text": column(texts, kind)}), path, row_group_size=7)


def write_arrow(path, texts, kind="plain", new=pa.ipc.new_stream):
  content = pa.table({"text": column(texts, kind)})
  with new(str(path), content.schema) as writer:
    writer.write_table(content, max_chunksize=7)


def text_files(path, texts):
  path.mkdir()
  for i, text in enumerate(texts):
    (path / f"{i:04}.txt").write_bytes(text.encode())


KINDS: dict[str, tuple[str, Callable, str]] = {
  "JSON lines": ("a.jsonl", json_lines, "text"),
  "JSON lines of Windows": ("a.jsonl", json_lines_raw, "text"),
  "JSON lines as C4 names them": ("c4-train.00000-of-01024.json", json_lines, "text"),
  "a JSON array": ("a.json", json_array, "text"),
  "nested JSON": ("a.jsonl", nested, "a.b.c"),
  "CSV": ("a.csv", table, "text"),
  "TSV": ("a.tsv", table, "text"),
  "Parquet": ("a.parquet", write_parquet, "text"),
  "a dictionary in Parquet": ("a.parquet", functools.partial(write_parquet, kind="dictionary"), "text"),
  "nested Parquet": ("a.parquet", functools.partial(write_parquet, kind="nested"), "text.b"),
  "an Arrow stream": ("a.arrow", write_arrow, "text"),
  "a dictionary in Arrow": ("a.arrow", functools.partial(write_arrow, kind="dictionary"), "text"),
  "nested Arrow": ("a.arrow", functools.partial(write_arrow, kind="nested"), "text.b"),
  "large strings in an Arrow file": (
    "a.arrow",
    functools.partial(write_arrow, kind="large", new=pa.ipc.new_file),
    "text",
  ),
}
EACH = pytest.mark.parametrize("kind", KINDS)


def compressed(path):
  """The file beside itself as gzip and as zstd, where its format can be compressed."""
  if path.suffix in (".parquet", ".arrow"):
    return []
  content = path.read_bytes()
  path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
  with pa.CompressedOutputStream(str(path.with_name(f"{path.name}.zst")), "zstd") as file:
    file.write(content)
  return [path.with_name(f"{path.name}.gz"), path.with_name(f"{path.name}.zst")]


@EACH
@pytest.mark.parametrize("seed", range(3))
def test_the_documents_are_those_that_were_written_in_order(tmp_path, kind, seed):
  name, write, field = KINDS[kind]
  texts = make_documents(seed)
  write(tmp_path / name, texts)
  for path in (tmp_path / name, *compressed(tmp_path / name)):
    assert list(documents(str(path), Reading(field))) == texts


def test_the_tokens_are_those_of_text_files_in_every_format_and_packed(tmp_path):
  texts = [text.replace("\r", "") for text in make_documents(0)]  # a text file has one kind of line end
  text_files(tmp_path / "files", texts)
  sources = {"text files": (str(tmp_path / "files"), "text")}
  for kind, (name, write, field) in KINDS.items():
    (tmp_path / kind).mkdir()
    write(tmp_path / kind / name, texts)
    sources[kind] = (str(tmp_path / kind), field)
  hashes, packed = set(), set()
  for kind, (source, field) in sources.items():
    data = Data(train=(source,), text_field=field, validation_fraction=0.3, sequence_length=8)
    summary = build_corpus(open_text(data), tmp_path / "cache").summary()
    hashes.add((summary["sha256"], summary["train_documents"], summary["validation_documents"]))
    manifest = pack([source], "bytes", tmp_path / "packed" / kind, reading=Reading(field), processes=1)
    packed.add((manifest["sha256"], manifest["documents"]))
  assert len(hashes) == len(packed) == 1


def test_equal_texts_are_on_one_side_of_the_split_whatever_they_are_called(tmp_path):
  texts = make_documents(1, count=200)
  for name in ("a.jsonl", "b.jsonl"):
    json_lines(tmp_path / name, texts)
  data = Data(train=(str(tmp_path),), validation_fraction=0.3, sequence_length=8)
  summary = build_corpus(open_text(data), tmp_path / "cache").summary()
  held_out = sum(is_held_out(document_key(text), 0.3) for text in texts)
  assert 30 <= held_out <= 90
  assert summary["validation_documents"] == 2 * held_out
  assert summary["validation_in_train"] == 0
  assert summary["train_duplicates"] == summary["train_documents"] - len(
    {text for text in texts if not is_held_out(document_key(text), 0.3)}
  )


@EACH
def test_null_texts_are_skipped_and_counted_in_every_format_that_has_them(tmp_path, kind):
  if "CSV" in kind or "TSV" in kind:
    pytest.skip("a cell is never null")
  name, write, field = KINDS[kind]
  write(tmp_path / name, ["a", None, "", "b", None, *map(str, range(40))])
  warnings: list[str] = []
  data = Data(train=(str(tmp_path / name),), text_field=field, validation_fraction=0.3, sequence_length=4)
  for _ in range(2):  # tokenized, and from the cache
    corpus = build_corpus(open_text(data), tmp_path / "cache", warn=warnings.append)
  assert corpus.summary()["nulls"] == 2
  assert corpus.summary()["train_documents"] + corpus.summary()["validation_documents"] == 42
  assert warnings == [f"2 documents whose {field!r} is null were skipped"] * 2
  pack([str(tmp_path / name)], "bytes", tmp_path / "packed", reading=Reading(field), processes=1, warn=warnings.append)
  assert warnings[2:] == warnings[:1]


@pytest.mark.parametrize("split", [None, 1, 7, 30])
def test_cut_documents_joined_are_the_text(tmp_path, split):
  texts = [text.replace("\r", "") for text in make_documents(2)]
  text_files(tmp_path / "files", texts)
  json_lines(tmp_path / "a.jsonl", texts)
  for source in ("files", "a.jsonl"):
    pieces = list(documents(str(tmp_path / source), Reading(document_length=split)))
    assert "".join(pieces) == "".join(texts)
    assert split is None or max(map(len, pieces)) <= split
  assert list(documents(str(tmp_path / "files"), Reading(document_length=split))) == pieces


def damaged(content: bytes, draw: random.Random) -> bytes:
  """A file that was cut off, overwritten in places, or both."""
  content = bytearray(content)
  if draw.random() < 0.6:
    del content[draw.randrange(len(content)) :]
  for _ in range(draw.choice([0, 1, 4])):
    if content:
      content[draw.randrange(len(content))] = draw.randrange(256)
  return bytes(content)


@pytest.mark.slow
@EACH
def test_whatever_happens_to_a_file_it_is_read_or_refused_in_one_line(tmp_path, kind):
  name, write, field = KINDS[kind]
  write(tmp_path / name, make_documents(3))
  draw = random.Random(kind)
  refused = 0
  for path in (tmp_path / name, *compressed(tmp_path / name)):
    whole = path.read_bytes()
    for _ in range(60):
      path.write_bytes(damaged(whole, draw))
      data = Data(train=(str(path),), text_field=field, sequence_length=4)
      reading = Reading(field, on_error="skip")
      skipped = [str(text) for text, _ in SourceFile(path.name, path).documents(reading) if isinstance(text, Damaged)]
      for read in (check_sources, lambda data: list(documents(*data.train, reading_of(data)))):
        try:
          read(data)
          assert read is check_sources or not skipped
        except UserError as error:
          refused += 1
          assert str(error).endswith(skipped[0]) or "is empty" in str(error)
          assert path.name in str(error) and "\n" not in str(error), error
  assert refused > 20


MALFORMED = {
  "empty.jsonl": (b"", "is empty"),
  "empty.jsonl.gz": (b"", "is empty"),
  "empty.parquet": (b"", "is empty"),
  "latin.txt": ("größe".encode("latin-1"), "byte 0xf6 is not utf-8; convert the file to UTF-8"),
  "latin.csv": ("text\ngröße".encode("latin-1"), "line 2: byte 0xf6 is not utf-8"),
  "latin.jsonl": ('{"text": "größe"}'.encode("latin-1"), "line 1: not JSON"),
  "utf16.txt": ("größe".encode("utf-16"), "byte 0xff is not utf-8"),
  "other.csv": (b"a,b\n1,2\n", r"line 1: no columns 'text' \(its columns: a, b\); set data.text_field"),
  "wide.csv": (b"a,text\n1,2,3\n", "line 2: 3 cells, but line 1 has 2; put cells that contain ',' in quotes"),
  "open.csv": (b'text\n"a\nb\n', "line 3: unexpected end of data"),
  "other.json": (b'[{"a": 1}]', r'element 1: no string "text" \(its fields: a\)'),
  "open.json": (b'[{"text": "a"}', "element 2: not JSON"),
  "number.json": (b"[1]", "element 1: JSON int, not an object"),
  "object.json": (b'{\n"text": "a"}', "line 1: not JSON"),
  "deep.json": (b"[" * 100_000, "element 1: not JSON"),
  "deep.jsonl": (b"[" * 100_000, "line 1: not JSON"),
  "list.jsonl": (b'{"text": ["a"]}', 'line 1: no string "text"'),
  "text.parquet": (b"text", "damaged .parquet file"),
  "text.arrow": (b"text", "damaged .arrow file"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_says_what_is_wrong_and_what_to_do(tmp_path, name):
  content, message = MALFORMED[name]
  (tmp_path / name).write_bytes(content)
  data = Data(train=(str(tmp_path / name),), validation_fraction=0.3, sequence_length=4)
  with pytest.raises(UserError, match=rf"{name}.*{message}") as caught:
    build_corpus(open_text(data), tmp_path / "cache")
  assert "\n" not in str(caught.value)


class _Handler(SimpleHTTPRequestHandler):
  """Serves a folder, without ranges as the standard library does, or with them."""

  ranges = False

  def log_message(self, *_):
    pass

  def do_GET(self):
    asked = self.headers.get("Range")
    if not (self.ranges and asked):
      super().do_GET()
      return
    with open(self.translate_path(self.path), "rb") as file:
      content = file.read()
    first, last = asked.removeprefix("bytes=").split("-")
    part = content[int(first) : int(last) + 1]
    self.send_response(206)
    self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
    self.send_header("Content-Length", str(len(part)))
    self.end_headers()
    self.wfile.write(part)


@pytest.fixture(params=[False, True], ids=["without ranges", "with ranges"])
def server(tmp_path, request):
  """The address of a server of `tmp_path`."""
  pytest.importorskip("aiohttp", reason="fsspec needs it for https://")
  handler = type("Handler", (_Handler,), {"ranges": request.param})
  with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path))) as httpd:
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))  # seconds between looks for the end
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()


@EACH
def test_a_web_server_gives_the_same_documents_with_a_query_too(tmp_path, server, kind):
  name, write, field = KINDS[kind]
  texts = make_documents(4)
  write(tmp_path / name, texts)
  for path in (tmp_path / name, *compressed(tmp_path / name)):
    for query in ("", "?download=true&name=a/b.txt"):
      assert list(documents(f"{server}/{path.name}{query}", Reading(field))) == texts


def test_a_large_file_from_a_web_server_is_whole(tmp_path, server):
  texts = [f"{n} {n * n} " * 30_000 for n in range(40)]
  json_lines(tmp_path / "large.jsonl", texts)  # 9 MB, more than fsspec reads at once
  write_parquet(tmp_path / "large.parquet", texts)
  for name in ("large.jsonl", "large.parquet"):
    assert list(documents(f"{server}/{name}")) == texts


def test_what_a_web_server_does_not_have_is_one_line(server):
  with pytest.raises(UserError, match=r"nowhere\.jsonl' does not exist or contains no file; correct the URL"):
    list(documents(f"{server}/nowhere.jsonl"))
