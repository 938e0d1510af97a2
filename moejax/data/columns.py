"""Texts from a column of Parquet files, or of Arrow files as written by Hugging Face `datasets`."""

from collections.abc import Iterator
from typing import Any, BinaryIO

from moejax.data.damage import Damaged
from moejax.errors import reason
from moejax.optional import library

COLUMN_SUFFIXES = (".parquet", ".arrow")
"""Suffixes of files with one document per row."""

_ROWS = 1024


def read_column(raw: BinaryIO, kind: str, place: str, column: str) -> Iterator[tuple[str | Damaged | None, int]]:
  """Yields the texts of a file, None for null, each with the bytes read so far. One batch of rows is in memory.

  A row that is not UTF-8 is yielded as an error.

  Args:
    raw: the bytes of the file.
    kind: its suffix.
    place: its name in errors.
    column: name of the column, or `a.b` for the field b of the column a of structs.

  Raises:
    Damaged: If the file is damaged or has no such column of strings.
  """
  arrow = library("pyarrow")
  try:
    schema, total, batches = _parquet(raw, column) if kind == ".parquet" else _arrow(raw)
    _check_column(schema, column, place)
    number, size = 0, _size(raw)
    for batch in batches:
      for value in _strings(batch, column):
        number += 1
        text: str | Damaged | None
        if isinstance(value, UnicodeDecodeError):
          byte = value.object[value.start]
          text = Damaged(f"{place} row {number}: byte {byte:#04x} is not utf-8; convert the file to UTF-8")
        else:
          text = value
        # If rows are counted, bytes are proportional to them. A stream of batches knows its position.
        yield text, raw.tell() if total is None else size * number // total
  except (arrow.ArrowException, UnicodeDecodeError, MemoryError, OSError) as error:
    if getattr(error, "errno", None):
      raise
    raise Damaged(f"{place}: damaged {kind} file ({reason(error)}); download or create it again") from None


def _parquet(raw: BinaryIO, column: str) -> tuple[Any, int | None, Iterator[Any]]:
  file = library("pyarrow.parquet").ParquetFile(raw)
  # A path selects a field of structs without the others.
  return file.schema_arrow, file.metadata.num_rows, file.iter_batches(_ROWS, columns=[column])


def _arrow(raw: BinaryIO) -> tuple[Any, int | None, Iterator[Any]]:
  """Opens the stream format of `datasets`, or the random-access file format of other programs."""
  ipc = library("pyarrow.ipc")
  magic = raw.read(6)
  raw.seek(0)
  if magic != b"ARROW1":
    stream = ipc.open_stream(raw)
    return stream.schema, None, iter(stream)
  file = ipc.open_file(raw)
  return file.schema, None, (file.get_batch(i) for i in range(file.num_record_batches))


def _path(names: list[str], column: str) -> list[str]:
  """The names of a column and of the fields within it."""
  return [column] if column in names else column.split(".")


def _check_column(schema: Any, column: str, place: str) -> None:
  types = library("pyarrow").types
  first, *inner = _path(schema.names, column)
  if schema.names.count(first) != 1:
    raise Damaged(
      f"{place}: {schema.names.count(first) or 'no'} columns {first!r} (its columns: {', '.join(schema.names)}); "
      "set data.text_field to one"
    )
  kind = schema.field(first).type
  for name in inner:
    names = [field.name for field in kind] if types.is_struct(kind) else []
    if names.count(name) != 1:
      raise Damaged(f"{place}: no column {column!r} ({first!r} holds {kind}); set data.text_field to one")
    kind = kind.field(name).type
  if types.is_dictionary(kind):
    kind = kind.value_type
  if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)):
    raise Damaged(f"{place}: column {column!r} holds {kind}, not strings; set data.text_field to a column of strings")


def _strings(batch: Any, column: str) -> list[str | UnicodeDecodeError | None]:
  first, *inner = _path(batch.schema.names, column)
  values, invalid = batch.column(first), None
  try:
    values.validate(full=True)  # without this, a damaged file would crash the process
  except library("pyarrow").ArrowInvalid as error:
    if "UTF8" not in str(error):
      raise
    invalid = error
  if inner:
    values = library("pyarrow.compute").struct_field(values, inner)  # null where a struct is
  return values.to_pylist() if invalid is None else list(map(_decoded, _as_bytes(values)))


def _as_bytes(values: Any) -> list[bytes | None]:
  arrow = library("pyarrow")
  if arrow.types.is_dictionary(values.type):
    values = arrow.DictionaryArray.from_arrays(values.indices, _binary(values.dictionary), safe=False)
  else:
    values = _binary(values)
  values.validate(full=True)
  return values.to_pylist()


def _binary(values: Any) -> Any:
  arrow = library("pyarrow")
  return values.cast(arrow.large_binary() if arrow.types.is_large_string(values.type) else arrow.binary())


def _decoded(content: bytes | None) -> str | UnicodeDecodeError | None:
  try:
    return None if content is None else content.decode()
  except UnicodeDecodeError as error:
    return error


def _size(raw: BinaryIO) -> int:
  place = raw.tell()
  size = raw.seek(0, 2)
  raw.seek(place)
  return size
