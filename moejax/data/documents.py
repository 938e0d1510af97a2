"""Reads documents from files of each kind, and determines which documents are held out."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, Protocol

from moejax.config.data import Data
from moejax.data.columns import COLUMN_SUFFIXES, read_column
from moejax.data.compression import COMPRESSIONS, DAMAGE, decompressed
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

  def __post_init__(self) -> None:
    if self.document_length is not None and self.document_length < 1:
      raise UserError(f"document_length={self.document_length} must be above 0")


READING = Reading()


def reading_of(data: Data) -> Reading:
  """The reading options of an experiment."""
  return Reading(data.text_field, data.document_length)


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
    """Raises UserError if the beginning of the part cannot be read."""

  def documents(self, reading: Reading) -> Iterator[tuple[str | None, int]]:
    """The texts in order, each with the bytes that were read so far.

    Empty texts are skipped. None stands for a null text, which is skipped too, but counted.
    """


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
    return self.path.stat().st_size if isinstance(self.path, pathlib.Path) else self.path.size

  @property
  def version(self) -> tuple[int | str, ...]:
    if isinstance(self.path, RemotePath):
      return self.path.size, self.path.fingerprint
    stat = self.path.stat()
    return stat.st_size, stat.st_mtime_ns

  def check(self, reading: Reading) -> None:
    if isinstance(self.path, pathlib.Path) and not os.access(self.path, os.R_OK):
      raise UserError(
        f"{str(self.path)!r} cannot be read (no permission); make it readable or remove it from the sources"
      )
    if self.kind not in TEXT_SUFFIXES:
      next(self.documents(reading), None)

  def documents(self, reading: Reading) -> Iterator[tuple[str | None, int]]:
    """Raises UserError with file and line if the file cannot be read or contains no document."""
    try:
      with self.path.open("rb") as raw:
        yield from self._documents(raw, reading)
    except UserError:
      raise
    except (OSError, *DAMAGE) as error:
      if self.compression and (isinstance(error, DAMAGE) or not error.errno):
        raise UserError(
          f"{self.path}: damaged {COMPRESSIONS[self.compression]} ({reason(error)}); download or create it again"
        ) from None
      why = getattr(error, "strerror", None) or reason(error)
      raise UserError(f"{self.path} cannot be read ({why}); make it readable or remove it from the sources") from None

  def _documents(self, raw: BinaryIO, reading: Reading) -> Iterator[tuple[str | None, int]]:
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


def split_each(texts: Iterator[tuple[str | None, int]], reading: Reading) -> Iterator[tuple[str | None, int]]:
  """Splits texts into documents of the requested length."""
  for text, read in texts:
    if text is None or reading.document_length is None:
      yield text, read
    else:
      yield from ((document, read) for document in split_text([text], reading.document_length))


def document_key(text: str) -> int:
  """A hash below 2**64 that is the same in every run, on every machine and in every Python version."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_held_out(key: int, fraction: float) -> bool:
  """Whether documents with this key belong to the held-out `fraction`. Equal texts have equal keys."""
  return key < fraction * 2**64


def nulls_warning(nulls: int, text_field: str) -> str:
  """The warning about null texts."""
  return f"{nulls:,} documents whose {text_field!r} is null were skipped"
