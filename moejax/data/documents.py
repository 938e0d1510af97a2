"""Documents: how each kind of file is read, and which documents are held out."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import pathlib
import tokenize
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, Protocol

from moejax.data.columns import COLUMN_SUFFIXES, read_column
from moejax.data.remote import RemotePath
from moejax.errors import UserError
from moejax.optional import library

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
"""Files that are one document each."""
LINE_SUFFIXES = (".jsonl",)
"""Files with one document a line: an object with a string "text" and, if it likes, an "id"."""
COMPRESSIONS = (".gz", ".zst")
SUFFIXES = (
  *TEXT_SUFFIXES,
  *LINE_SUFFIXES,
  *(kind + compression for kind in TEXT_SUFFIXES + LINE_SUFFIXES for compression in COMPRESSIONS),
  *COLUMN_SUFFIXES,
)
"""Every file that is understood."""

_BUFFER = 2**20


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and the name that, with it, decides the split."""

  name: str
  """Path relative to the source, with #id or #line where a file holds many; the same on every machine."""
  text: str
  """Never empty, and always encodable as UTF-8."""


class Part(Protocol):
  """What a source consists of: a file, or the split of a dataset."""

  @property
  def name(self) -> str:
    """Its name within the source."""

  @property
  def place(self) -> str:
    """Where it lies."""

  @property
  def size(self) -> int:
    """Bytes, in the unit of `documents`."""

  @property
  def version(self) -> tuple[int | str, ...]:
    """Differs where the content has changed, without reading it."""

  def check(self, text_field: str) -> None:
    """Raises UserError where the beginning already shows that it cannot be read."""

  def documents(self, text_field: str) -> Iterator[tuple[Document, int]]:
    """The documents in order, each with the bytes that were read so far; empty texts are skipped."""


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """A file of a source."""

  name: str
  """Path relative to the source, with forward slashes."""
  path: pathlib.Path | RemotePath
  """Where it lies."""
  errors: Literal["strict", "replace"] = "strict"
  """What bytes do that are not text in the file's encoding: raise, or become U+FFFD."""

  @property
  def kind(self) -> str:
    """Its suffix, whatever it is compressed with."""
    name = self.path.name
    return pathlib.PurePath(name.removesuffix(self.compression)).suffix

  @property
  def compression(self) -> str:
    """Suffix of its compression, empty where it has none."""
    return next((suffix for suffix in COMPRESSIONS if self.path.name.endswith(suffix)), "")

  @property
  def place(self) -> str:
    return str(self.path.resolve())

  @property
  def size(self) -> int:
    return self.path.stat().st_size if isinstance(self.path, pathlib.Path) else self.path.size

  @property
  def version(self) -> tuple[int | str, ...]:
    if isinstance(self.path, RemotePath):
      return self.path.size, self.path.fingerprint
    stat = self.path.stat()
    return stat.st_size, stat.st_mtime_ns

  def check(self, text_field: str) -> None:
    if isinstance(self.path, pathlib.Path) and not os.access(self.path, os.R_OK):
      raise UserError(f"{str(self.path)!r} cannot be read (no permission); make it readable or leave it out")
    if self.kind not in TEXT_SUFFIXES:
      next(read_documents(self, text_field), None)

  def documents(self, text_field: str) -> Iterator[tuple[Document, int]]:
    return read_documents(self, text_field)


def read_documents(file: SourceFile, text_field: str = "text") -> Iterator[tuple[Document, int]]:
  """The documents of a file, in order, each with the bytes of the file that were read so far; empty texts are skipped.

  Raises:
    UserError: the file cannot be read or a line is no document; the message names file and line.
  """
  try:
    with file.path.open("rb") as raw:
      if file.kind in COLUMN_SUFFIXES:
        for number, text, done in read_column(raw, file.kind, str(file.path), text_field):
          if text:
            yield Document(f"{file.name}#{number}", text), done
      elif file.kind in LINE_SUFFIXES:
        yield from _read_lines(file, raw, text_field)
      else:
        yield from _read_text(file, raw)
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


def _read_text(file: SourceFile, raw: BinaryIO) -> Iterator[tuple[Document, int]]:
  try:
    content = _decompressed(file, raw).read()
  except _damages(file) as error:
    raise _damage(file, 1, error) from None
  encoding = _python_encoding(file, content) if file.kind == ".py" else "utf-8-sig"
  try:
    text = content.decode(encoding, file.errors)
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    raise UserError(
      f"{file.path} line {line}: byte {content[error.start]:#04x} is not {encoding.removesuffix('-sig')}; "
      "convert the file to UTF-8"
    ) from None
  # Line ends of Windows would make another corpus, and another split, of the same text.
  text = text.replace("\r\n", "\n").replace("\r", "\n")
  if text:
    yield Document(file.name, text), file.size


def _python_encoding(file: SourceFile, content: bytes) -> str:
  """The encoding that a Python file declares (PEP 263)."""
  try:
    return tokenize.detect_encoding(io.BytesIO(content).readline)[0]
  except SyntaxError as error:
    if file.errors == "replace":
      return "utf-8"
    raise UserError(f"{file.path} line 1: {error.msg}; convert the file to UTF-8") from None


def _read_lines(file: SourceFile, raw: BinaryIO, text_field: str) -> Iterator[tuple[Document, int]]:
  number = 0
  try:
    for line in _decompressed(file, raw):
      number += 1
      if line.strip() and (document := _line_document(file, number, line, text_field)):
        yield document, raw.tell()
  except _damages(file) as error:
    raise _damage(file, number + 1, error) from None


def _decompressed(file: SourceFile, raw: BinaryIO) -> BinaryIO:
  match file.compression:
    case ".gz":
      return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]  # it reads like one
    case ".zst":
      # pyarrow's reader, because it notices where a file was cut off.
      return io.BufferedReader(library("pyarrow").CompressedInputStream(raw, "zstd"), _BUFFER)
    case _:
      return raw


def _damages(file: SourceFile) -> tuple[type[Exception], ...]:
  """What reading a damaged file of this compression raises."""
  return {".gz": (gzip.BadGzipFile, EOFError, zlib.error), ".zst": (OSError,)}.get(file.compression, ())


def _damage(file: SourceFile, line: int, error: Exception) -> UserError:
  kind = {".gz": "gzip", ".zst": "zstd"}[file.compression]
  return UserError(f"{file.path} line {line}: damaged {kind} ({error}); fetch or write it again")


def _line_document(file: SourceFile, number: int, line: bytes, text_field: str) -> Document | None:
  """The document of one line, None where its text is empty."""
  need = f'each line must be a JSON object with a string "{text_field}"'
  try:
    record = json.loads(line)
  except ValueError as error:
    raise UserError(f"{file.path} line {number}: not JSON ({error}); {need}") from None
  if not isinstance(record, dict):
    raise UserError(f"{file.path} line {number}: JSON {type(record).__name__}, not an object; {need}")
  text = record.get(text_field)
  if not isinstance(text, str):
    fields = ", ".join(record) or "none"
    raise UserError(f'{file.path} line {number}: no string "{text_field}" (its fields: {fields}); {need}')
  return Document(f"{file.name}#{record.get('id', number)}", _encodable(text)) if text else None


def _encodable(text: str) -> str:
  """JSON escapes can spell half a surrogate pair, which UTF-8 cannot encode: it becomes U+FFFD."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
  return text
