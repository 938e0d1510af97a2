import gzip
import json

import pytest

from moejax.data.documents import READING, Reading, SourceFile, document_key, is_held_out
from moejax.errors import UserError


def read(path, **options):
  return [text for text, _ in SourceFile(path.name, path, **options).documents(READING)]


def compress(path, content):
  """Writes bytes, compressed as the name says."""
  match path.suffix:
    case ".gz":
      path.write_bytes(gzip.compress(content))
    case ".zst":
      pyarrow = pytest.importorskip("pyarrow")
      with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)
    case _:
      path.write_bytes(content)


def write_lines(path, *records):
  text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
  compress(path, text.encode())
  return path


def test_a_text_file_is_one_document_with_plain_line_ends_and_no_byte_order_mark(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
  assert read(path) == ["one\ntwo\nthree\n"]


def test_an_empty_file_is_no_document(tmp_path):
  path = tmp_path / "a.md"
  path.touch()
  assert read(path) == []


def test_a_python_file_is_read_in_the_encoding_it_declares(tmp_path):
  path = tmp_path / "a.py"
  path.write_bytes("# coding: latin-1\nname = 'é'\n".encode("latin-1"))
  assert read(path)[0] == "# coding: latin-1\nname = 'é'\n"


@pytest.mark.parametrize("name", ["a.txt.gz", "a.md.zst"])
def test_a_compressed_text_file_is_one_document(tmp_path, name):
  compress(tmp_path / name, b"one\r\ntwo\n" * 99)
  assert read(tmp_path / name) == ["one\ntwo\n" * 99]


def test_a_compressed_python_file_is_read_in_the_encoding_it_declares(tmp_path):
  compress(tmp_path / "a.py.gz", "# coding: latin-1\nname = 'é'\n".encode("latin-1"))
  assert read(tmp_path / "a.py.gz")[0] == "# coding: latin-1\nname = 'é'\n"


def test_another_field_can_hold_the_text(tmp_path):
  path = write_lines(tmp_path / "a.jsonl", {"text": "no", "content": "yes"})
  assert [text for text, _ in SourceFile("a.jsonl", path).documents(Reading("content"))] == ["yes"]
  with pytest.raises(UserError, match=r'line 1: no string "body" \(its fields: text, content\); .* a string "body"'):
    list(SourceFile("a.jsonl", path).documents(Reading("body")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_each_line_that_is_not_blank_is_a_document(tmp_path, name):
  path = write_lines(tmp_path / name, {"text": "one"}, "", {"text": "two"}, {"text": ""}, {"text": None}, {"text": "5"})
  assert read(path) == ["one", "two", "", None, "5"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.txt.zst"])
def test_the_bytes_read_so_far_grow_to_the_size_of_the_file(tmp_path, name):
  path = write_lines(tmp_path / name, *({"text": f"line {n}"} for n in range(5)))
  read_so_far = [read for _, read in SourceFile(name, path).documents(READING)]
  assert read_so_far == sorted(read_so_far)
  assert read_so_far[-1] == path.stat().st_size


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
  path = write_lines(tmp_path / "a.jsonl", r'{"text": "a\ud800b \ud83d\ude42"}')
  assert read(path)[0] == "a�b 🙂"


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{text: 1}", r"a\.jsonl line 3: not JSON \(Expecting property name.*each line must be a JSON object"),
    ('["text"]', r"a\.jsonl line 3: JSON list, not an object"),
    ('{"content": "x", "n": 1}', r'a\.jsonl line 3: no string "text" \(its fields: content, n\)'),
    ('{"text": 7}', r'a\.jsonl line 3: no string "text" \(its fields: text\)'),
    ("{}", r'a\.jsonl line 3: no string "text" \(its fields: none\)'),
  ],
)
def test_a_bad_line_is_named_after_the_good_ones_before_it(tmp_path, line, message):
  path = write_lines(tmp_path / "a.jsonl", {"text": "one"}, "", line)
  reading = SourceFile(path.name, path).documents(READING)
  assert next(reading)[0] == "one"
  with pytest.raises(UserError, match=message):
    next(reading)


@pytest.mark.parametrize(("suffix", "kind"), [("gz", "gzip"), ("zst", "zstd")])
def test_a_truncated_file_is_named(tmp_path, suffix, kind):
  path = write_lines(tmp_path / f"a.jsonl.{suffix}", *({"text": str(n) * 99} for n in range(9)))
  path.write_bytes(path.read_bytes()[:-12])
  with pytest.raises(UserError, match=rf"a\.jsonl\.{suffix}: damaged {kind}"):
    read(path)


def test_a_file_that_is_no_gzip_is_named(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  path.write_text('{"text": "plain"}')
  with pytest.raises(UserError, match=r"a\.jsonl\.gz: damaged gzip .*download or create it again"):
    read(path)


def test_bytes_that_are_not_text_are_named_or_replaced(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes(b"one\ntwo \xe9\n")
  with pytest.raises(UserError, match=r"a\.txt line 2: byte 0xe9 is not utf-8; convert the file to UTF-8"):
    read(path)
  assert read(path, errors="replace")[0] == "one\ntwo �\n"


def test_an_unknown_python_encoding_is_named_or_read_as_utf8(tmp_path):
  path = tmp_path / "a.py"
  path.write_bytes(b"# coding: klingon\nx = 1\n")
  with pytest.raises(UserError, match=r"a\.py line 1: unknown encoding: klingon; convert the file to UTF-8"):
    read(path)
  assert read(path, errors="replace")[0].endswith("x = 1\n")


def test_the_key_is_the_same_in_every_run():
  # A changed value would move documents between the splits of every existing comparison.
  assert document_key("text") == 0x982D9E3EB996F559


def test_the_held_out_part_is_the_fraction_and_grows_with_it():
  keys = [document_key(f"text {n}") for n in range(4000)]
  small, large = ({key for key in keys if is_held_out(key, fraction)} for fraction in (0.05, 0.2))
  assert small < large
  # Four standard deviations of a binomial of 4000.
  assert len(small) == pytest.approx(200, abs=55)
  assert len(large) == pytest.approx(800, abs=101)
  assert not any(is_held_out(key, 0.0) for key in keys)
