"""Reads documents from files of each kind, and determines which documents are held out."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, Protocol

from moejax.config.data import Data, OnError
from moejax.data.columns import COLUMN_SUFFIXES, read_column
from moejax.data.compression import COMPRESSIONS, DAMAGE, decompressed
from moejax.data.damage import Damaged, unreadable
from moejax.data.records import RECORD_SUFFIXES, read_records
from moejax.data.remote import RemotePath
from moejax.data.text_files import decoded, split_text
from moejax.errors import UserError, reason

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
"""Suffixes of files that contain one document."""
SUFFIXES = (
  *TEXT_SUFFIXES,
  *RECORD_SUFFIXES,
  *(kind + compression for kind in TEXT_SUFFIXES + RECORD_SUFFIXES for compression in COMPRESSIONS),
  *COLUMN_SUFFIXES,
)
"""Suffixes of all supported files."""


@dataclasses.dataclass(frozen=True)
class Reading:
  """How a source is read as documents."""

  text_field: str = "text"
  """As data.text_field."""
  document_length: int | None = None
  """As data.document_length."""
  on_error: OnError = "stop"
  """As data.on_error."""

  def __post_init__(self) -> None:
    if self.document_length is not None and self.document_length < 1:
      raise UserError(f"document_length={self.document_length} must be above 0")


READING = Reading()


def reading_of(data: Data) -> Reading:
  """The reading options of an experiment."""
  return Reading(data.text_field, data.document_length, data.on_error)


Document = str | None | Damaged
"""A text, None for a null text, or the error of an unreadable record. Empty texts are skipped, and so are null texts,
which are counted. Errors are yielded only if on_error is "skip"; otherwise they are raised."""


class Part(Protocol):
  """A part of a source: a file, or the split of a dataset."""

  @property
  def name(self) -> str:
    """Its name within the source."""

  @property
  def place(self) -> str:
    """Its location."""

  @property
  def size(self) -> int:
    """Size in bytes, counted as by `documents`."""

  @property
  def version(self) -> tuple[int | str, ...]:
    """A string that differs if the content has changed, obtained without reading it."""

  def check(self, reading: Reading) -> None:
    """Raises UserError if the beginning of the part cannot be read; what `reading` skips is no error."""

  def documents(self, reading: Reading) -> Iterator[tuple[Document, int]]:
    """The texts in order, each with the bytes that were read so far."""


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """A file of a source."""

  name: str
  """Path relative to the source, with forward slashes."""
  path: pathlib.Path | RemotePath
  """Its location."""
  errors: Literal["strict", "replace"] = "strict"
  """Whether bytes that are invalid in the encoding of the file raise an error or are replaced by U+FFFD."""

  @property
  def kind(self) -> str:
    """Its suffix without that of the compression."""
    name = self.path.name
    return pathlib.PurePath(name.removesuffix(self.compression)).suffix

  @property
  def compression(self) -> str:
    """The suffix of its compression, or empty."""
    return next((suffix for suffix in COMPRESSIONS if self.path.name.endswith(suffix)), "")

  @property
  def place(self) -> str:
    return str(self.path.resolve())

  @property
  def size(self) -> int:
    """0 if the file has been deleted since it was listed. Reading it raises an error."""
    try:
      return self.path.stat().st_size if isinstance(self.path, pathlib.Path) else self.path.size
    except (OSError, Damaged):
      return 0

  @property
  def version(self) -> tuple[int | str, ...]:
    """Empty if the file has been deleted since it was listed."""
    try:
      if isinstance(self.path, RemotePath):
        return self.path.size, self.path.fingerprint
      stat = self.path.stat()
    except (OSError, Damaged):
      return ()
    return stat.st_size, stat.st_mtime_ns

  def check(self, reading: Reading) -> None:
    if self.kind not in TEXT_SUFFIXES:
      next(self.documents(reading), None)
    elif reading.on_error == "stop" and isinstance(self.path, pathlib.Path):
      try:
        self.path.open("rb").close()
      except OSError as error:
        raise unreadable(repr(str(self.path)), error) from None

  def documents(self, reading: Reading) -> Iterator[tuple[Document, int]]:
    """The documents. An unreadable file ends with an error that names file and line."""
    size = self.size
    try:
      with self.path.open("rb") as raw:
        for text, read in self._documents(raw, reading):
          if isinstance(text, Damaged) and reading.on_error == "stop":
            raise text
          yield text, read
    except Damaged as error:
      if reading.on_error == "stop":
        raise
      yield error, size
    except (OSError, *DAMAGE) as error:
      if isinstance(error, OSError) and error.errno:
        unread = unreadable(str(self.path), error)
      else:
        kind = COMPRESSIONS.get(self.compression, "file")
        unread = Damaged(f"{self.path}: damaged {kind} ({reason(error)}); download or create it again")
      if reading.on_error == "stop" or not isinstance(unread, Damaged):
        raise unread from None
      yield unread, size

  def _documents(self, raw: BinaryIO, reading: Reading) -> Iterator[tuple[Document, int]]:
    place = str(self.path)
    if self.kind in COLUMN_SUFFIXES:
      yield from split_each(read_column(raw, self.kind, place, reading.text_field), reading)
      return
    stream = decompressed(raw, self.compression)
    if self.kind in TEXT_SUFFIXES:
      for document in split_text(decoded(stream, place, self.kind, self.errors), reading.document_length):
        yield document, raw.tell()
      return
    texts = read_records(stream, self.kind, place, reading.text_field)
    yield from split_each(((text, raw.tell()) for text in texts), reading)


def split_each(texts: Iterator[tuple[Document, int]], reading: Reading) -> Iterator[tuple[Document, int]]:
  """Splits texts into documents of the requested length."""
  for text, read in texts:
    if isinstance(text, str) and reading.document_length is not None:
      yield from ((document, read) for document in split_text([text], reading.document_length))
    else:
      yield text, read


def document_key(text: str) -> int:
  """A hash below 2**64 that is the same in every run, on every machine and in every Python version."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_held_out(key: int, fraction: float) -> bool:
  """Whether documents with this key belong to the held-out `fraction`. Equal texts have equal keys."""
  return key < fraction * 2**64


def nulls_warning(nulls: int, text_field: str) -> str:
  """The warning about null texts."""
  return f"{nulls:,} documents whose {text_field!r} is null were skipped"
