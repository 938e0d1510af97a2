"""Texts from a column of Parquet and Arrow files, the latter as Hugging Face `datasets` leaves them on disk."""

from collections.abc import Iterator
from typing import Any, BinaryIO

from moejax.errors import UserError
from moejax.optional import library

COLUMN_SUFFIXES = (".parquet", ".arrow")
"""Files with one document a row."""

_ROWS = 1024


def read_column(raw: BinaryIO, kind: str, place: str, column: str) -> Iterator[tuple[int, str, int]]:
  """Rows of a file as (number from 1, text or "", bytes read so far), a batch of rows in memory at a time.

  Raises:
    UserError: the file is damaged, or has no such column of strings.
  """
  arrow = library("pyarrow")
  try:
    names, total, batches = _parquet(raw, column) if kind == ".parquet" else _arrow(raw, column)
    if column not in names:
      raise UserError(f"{place}: no column {column!r} (its columns: {', '.join(names)}); set data.text_field to one")
    number = 0
    for batch in batches:
      for text in _strings(batch.column(column), place, column):
        number += 1
        # Where rows are counted, bytes are in proportion; a stream of batches knows how far it has read.
        done = raw.tell() if total is None else _size(raw) * number // total
        yield number, text or "", done
  except arrow.ArrowException as error:
    raise UserError(f"{place}: damaged {kind} file ({error}); fetch or write it again") from None


def _parquet(raw: BinaryIO, column: str) -> tuple[list[str], int | None, Iterator[Any]]:
  file = library("pyarrow.parquet").ParquetFile(raw)
  names = file.schema_arrow.names
  batches = file.iter_batches(_ROWS, columns=[column]) if column in names else iter(())
  return names, file.metadata.num_rows, batches


def _arrow(raw: BinaryIO, column: str) -> tuple[list[str], int | None, Iterator[Any]]:
  """The stream that `datasets` writes, or the random-access file that others do."""
  ipc = library("pyarrow.ipc")
  magic = raw.read(6)
  raw.seek(0)
  if magic != b"ARROW1":
    stream = ipc.open_stream(raw)
    return stream.schema.names, None, iter(stream)
  file = ipc.open_file(raw)
  return file.schema.names, None, (file.get_batch(i) for i in range(file.num_record_batches))


def _strings(column: Any, place: str, name: str) -> list[str | None]:
  types = library("pyarrow").types
  kind = column.type
  if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
    raise UserError(f"{place}: column {name!r} holds {kind}, not strings; set data.text_field to a column of strings")
  return column.to_pylist()


def _size(raw: BinaryIO) -> int:
  place = raw.tell()
  size = raw.seek(0, 2)
  raw.seek(place)
  return size
