"""Documents: how each kind of file is read, and which documents are held out. Standard library only."""

import dataclasses
import gzip
import hashlib
import io
import json
import pathlib
import tokenize
import zlib
from collections.abc import Iterator
from typing import Literal

from moejax.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
"""Files that are one document each."""
JSON_SUFFIXES = (".jsonl", ".jsonl.gz")
"""Files with one document a line: an object with a string "text" and, if it likes, an "id"."""


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and the name that, with it, decides the split."""

  name: str
  """Path relative to the source, with #id or #line where a file holds many; the same on every machine."""
  text: str
  """Never empty, and always encodable as UTF-8."""


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """A file of a source."""

  name: str
  """Path relative to the source, with forward slashes."""
  path: pathlib.Path
  """Where it lies."""
  errors: Literal["strict", "replace"] = "strict"
  """What bytes do that are not text in the file's encoding: raise, or become U+FFFD."""

  @property
  def holds_lines(self) -> bool:
    """Whether each line is a document."""
    return self.path.name.endswith(JSON_SUFFIXES)


def read_documents(file: SourceFile) -> Iterator[tuple[Document, int]]:
  """The documents of a file, in order, each with the bytes of the file that were read so far; empty texts are skipped.

  Raises:
    UserError: the file cannot be read or a line is no document; the message names file and line.
  """
  try:
    yield from _read_lines(file) if file.holds_lines else _read_text(file)
  except OSError as error:
    raise UserError(
      f"{file.path} cannot be read ({error.strerror or error}); make it readable or leave it out"
    ) from None


def document_key(document: Document) -> int:
  """A hash of name and text below 2**64, the same in every run, on every machine, in every Python."""
  content = document.name.encode(errors="replace") + b"\0" + document.text.encode()
  return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def is_held_out(document: Document, fraction: float) -> bool:
  """Whether the document belongs to the `fraction` of documents that training must not see."""
  return document_key(document) < fraction * 2**64


def _read_text(file: SourceFile) -> Iterator[tuple[Document, int]]:
  raw = file.path.read_bytes()
  encoding = _python_encoding(file, raw) if file.path.suffix == ".py" else "utf-8-sig"
  try:
    text = raw.decode(encoding, file.errors)
  except UnicodeDecodeError as error:
    line = raw.count(b"\n", 0, error.start) + 1
    raise UserError(
      f"{file.path} line {line}: byte {raw[error.start]:#04x} is not {encoding.removesuffix('-sig')}; "
      "convert the file to UTF-8"
    ) from None
  # Line ends of Windows would make another corpus, and another split, of the same text.
  text = text.replace("\r\n", "\n").replace("\r", "\n")
  if text:
    yield Document(file.name, text), len(raw)


def _python_encoding(file: SourceFile, raw: bytes) -> str:
  """The encoding that a Python file declares (PEP 263)."""
  try:
    return tokenize.detect_encoding(io.BytesIO(raw).readline)[0]
  except SyntaxError as error:
    if file.errors == "replace":
      return "utf-8"
    raise UserError(f"{file.path} line 1: {error.msg}; convert the file to UTF-8") from None


def _read_lines(file: SourceFile) -> Iterator[tuple[Document, int]]:
  number = 0
  with file.path.open("rb") as raw:
    lines = gzip.GzipFile(fileobj=raw) if file.path.suffix == ".gz" else raw
    try:
      for line in lines:
        number += 1
        if line.strip() and (document := _line_document(file, number, line)):
          yield document, raw.tell()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise UserError(f"{file.path} line {number + 1}: damaged gzip ({error}); fetch or write it again") from None


def _line_document(file: SourceFile, number: int, line: bytes) -> Document | None:
  """The document of one line, None where its text is empty."""
  need = 'each line must be a JSON object with a string "text"'
  try:
    record = json.loads(line)
  except ValueError as error:
    raise UserError(f"{file.path} line {number}: not JSON ({error}); {need}") from None
  if not isinstance(record, dict):
    raise UserError(f"{file.path} line {number}: JSON {type(record).__name__}, not an object; {need}")
  text = record.get("text")
  if not isinstance(text, str):
    fields = ", ".join(record) or "none"
    raise UserError(f'{file.path} line {number}: no string "text" (its fields: {fields}); {need}')
  return Document(f"{file.name}#{record.get('id', number)}", _encodable(text)) if text else None


def _encodable(text: str) -> str:
  """JSON escapes can spell half a surrogate pair, which UTF-8 cannot encode: it becomes U+FFFD."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
  return text
