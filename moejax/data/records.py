"""Texts from files of records: JSON lines, one JSON array, CSV and TSV."""

import codecs
import csv
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from moejax.data.damage import Damaged
from moejax.data.text_files import CHUNK

RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
"""Suffixes of files with one document per record. .jsonl and .json have one JSON object per line, or .json has one
array of objects. .csv and .tsv start with a line of column names."""

_MISSING = object()
_DECODER = json.JSONDecoder()
_SEPARATOR = {sign: re.compile(rf"[ \t\r\n]*{re.escape(sign)}[ \t\r\n]*") for sign in "[,"}
"""The separators before the first and before each other element of an array."""
_CLOSED = {"[": re.compile(r"\s*\[\s*\]\s*"), ",": re.compile(r"\s*\]\s*")}
_LONGEST_LITERAL = 16  # maximum number of missing characters of a number, literal or escape at the end of a chunk


def read_records(stream: BinaryIO, kind: str, place: str, field: str) -> Iterator[str | Damaged | None]:
  """Yields the texts in order, or None for null.

  A record that is malformed or does not have the field is yielded as an error with file and line.
  """
  if kind in (".csv", ".tsv"):
    return _table(stream, "," if kind == ".csv" else "\t", place, field)
  return _json(stream, kind == ".json", place, field)


def find_field(record: Mapping[str, Any], field: str) -> Any:
  """The value of a field. `a.b` is the field b of the mapping a, or None if a is null.

  Raises:
    KeyError: If the field does not exist.
  """
  if field in record:
    return record[field]
  head, _, rest = field.partition(".")
  inner = record[head] if rest else _MISSING
  if inner is None:
    return None
  if not isinstance(inner, Mapping):
    raise KeyError(field)
  return find_field(inner, rest)


def _json(stream: BinaryIO, may_be_array: bool, place: str, field: str) -> Iterator[str | Damaged | None]:
  need = f'each line must be a JSON object with a string "{field}"'
  number, line = 1, stream.readline(CHUNK)
  while line and not line.removeprefix(codecs.BOM_UTF8).strip():
    number, line = number + 1, stream.readline(CHUNK)
  if may_be_array and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
    yield from _array(line, stream, place, field)
    return
  if not line.endswith(b"\n"):
    line += stream.readline()
  while line:
    if line.strip():
      try:
        record = json.loads(line)
      except (ValueError, RecursionError) as error:
        yield Damaged(f"{place} line {number}: not JSON ({error}); {need}")
      else:
        yield _text(record, f"{place} line {number}", field, need)
    number, line = number + 1, stream.readline()


def _array(head: bytes, stream: BinaryIO, place: str, field: str) -> Iterator[str | Damaged | None]:
  need = f'each element must be an object with a string "{field}"'
  number = 0
  try:
    for record in _elements(_decoded(head, stream)):
      number += 1
      yield _text(record, f"{place} element {number}", field, need)
  except (ValueError, RecursionError) as error:
    yield Damaged(f"{place} element {number + 1}: not JSON ({error}); {need}")


def _decoded(head: bytes, stream: BinaryIO) -> Iterator[str]:
  decoder = codecs.getincrementaldecoder("utf-8-sig")()
  while head:
    yield decoder.decode(head)
    head = stream.read(CHUNK)
  yield decoder.decode(b"", final=True)


def _elements(chunks: Iterator[str]) -> Iterator[Any]:
  """Yields the elements of an array in JSON chunks, without loading the whole array."""
  text, at, before = "", 0, "["
  for chunk in chunks:
    text, at = text[at:] + chunk, 0
    while match := _SEPARATOR[before].match(text, at):
      try:
        element, at = _DECODER.raw_decode(text, match.end())
      except json.JSONDecodeError as error:
        if error.pos < len(text) - _LONGEST_LITERAL and not error.msg.startswith("Unterminated"):
          raise
        break  # it continues in the next chunk
      yield element
      before = ","
  if not _CLOSED[before].fullmatch(text, at):
    _DECODER.raw_decode(text, match.end() if match else at)  # raises the error
    raise ValueError(f"the array neither continues nor ends at {text[at : at + 20]!r}")


def _table(stream: BinaryIO, delimiter: str, place: str, field: str) -> Iterator[str | Damaged | None]:
  csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
  lines = _Lines(stream)
  # Without strict, a stray quote would include the following lines in the text.
  rows = csv.reader(lines, delimiter=delimiter, strict=True)
  names: list[str] | None = None
  while True:
    try:
      row = next(rows, None)
    except csv.Error as error:
      row, remedy = [], "put cells that contain quotes in quotes, and double the quotes"
      lines.invalid = f"line {rows.line_num}: {error}; {remedy}"
    if row is None:
      return
    invalid, lines.invalid = lines.invalid, None
    if names is None and not invalid:
      names = row
      if names.count(field) == 1:
        continue
      invalid = (
        f"line 1: {names.count(field) or 'no'} columns {field!r} (its columns: {', '.join(names)}); set "
        "data.text_field to one"
      )
    if names is None or names.count(field) != 1:
      yield Damaged(f"{place} {invalid}")
      return
    if not invalid and row and len(row) != len(names):
      invalid = (
        f"line {rows.line_num}: {len(row)} cells, but line 1 has {len(names)}; put cells that contain {delimiter!r} in "
        "quotes"
      )
    if invalid:
      yield Damaged(f"{place} {invalid}")
    elif row:
      yield row[names.index(field)]


class _Lines:
  """Iterates over the lines of a table as text. `invalid` is set if a line is not UTF-8, until the caller resets it."""

  def __init__(self, stream: BinaryIO):
    self.invalid: str | None = None
    self._lines = enumerate(stream, 1)

  def __iter__(self) -> Iterator[str]:
    return self

  def __next__(self) -> str:
    number, line = next(self._lines)
    encoding = "utf-8-sig" if number == 1 else "utf-8"
    try:
      return line.decode(encoding)
    except UnicodeDecodeError as error:
      self.invalid = f"line {number}: byte {line[error.start]:#04x} is not utf-8; convert the file to UTF-8"
      return line.decode(encoding, "replace")


def _text(record: Any, place: str, field: str, need: str) -> str | Damaged | None:
  if not isinstance(record, dict):
    return Damaged(f"{place}: JSON {type(record).__name__}, not an object; {need}")
  try:
    text = find_field(record, field)
  except KeyError:
    text = _MISSING
  if text is None:
    return None
  if not isinstance(text, str):
    return Damaged(f'{place}: no string "{field}" (its fields: {", ".join(record) or "none"}); {need}')
  return encodable(text)


def encodable(text: str) -> str:
  """Replaces lone surrogates, which JSON escapes can contain but UTF-8 cannot encode, by U+FFFD."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
  return text
