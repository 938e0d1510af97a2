"""Texts in Parquet and Arrow files."""

import pytest

from moejax.data.documents import READING, Reading, SourceFile
from moejax.errors import UserError

pa = pytest.importorskip("pyarrow", reason="of the extra `data`")
parquet = pytest.importorskip("pyarrow.parquet")
ROWS = [f"row {n}" for n in range(3000)]


def table(**columns):
  return pa.table(columns or {"id": list(range(len(ROWS))), "text": ROWS})


def write(path, kind, content=None):
  content = table() if content is None else content
  match kind:
    case "parquet":
      parquet.write_table(content, path)
    case "stream":  # as `datasets` does
      with pa.ipc.new_stream(str(path), content.schema) as writer:
        writer.write_table(content, max_chunksize=1000)
    case "file":
      with pa.ipc.new_file(str(path), content.schema) as writer:
        writer.write_table(content, max_chunksize=1000)
  return SourceFile(path.name, path)


KINDS = pytest.mark.parametrize(
  ("kind", "name"), [("parquet", "a.parquet"), ("stream", "a.arrow"), ("file", "b.arrow")]
)


@KINDS
def test_each_row_is_a_document(tmp_path, kind, name):
  assert [text for text, _ in write(tmp_path / name, kind).documents(READING)] == ROWS


@KINDS
def test_the_bytes_read_so_far_grow_to_the_size_of_the_file(tmp_path, kind, name):
  file = write(tmp_path / name, kind)
  done = [read for _, read in file.documents(READING)]
  assert done == sorted(done)
  assert 0 < done[0] < done[-1] <= file.size
  assert done[-1] > 0.9 * file.size


@KINDS
def test_a_null_row_is_told_from_an_empty_one(tmp_path, kind, name):
  file = write(tmp_path / name, kind, table(text=["a", None, "", "b"]))
  assert [text for text, _ in file.documents(READING)] == ["a", None, "", "b"]


@KINDS
def test_a_missing_column_names_those_there_are(tmp_path, kind, name):
  file = write(tmp_path / name, kind, table(content=["a"], n=[1]))
  assert [text for text, _ in file.documents(Reading("content"))] == ["a"]
  with pytest.raises(UserError, match=rf"{name}: no columns 'text' \(its columns: content, n\); set data\.text_field"):
    list(file.documents(READING))
  with pytest.raises(UserError, match=rf"{name}: column 'n' holds int64, not strings"):
    list(file.documents(Reading("n")))


@KINDS
def test_a_damaged_file_is_named(tmp_path, kind, name):
  file = write(tmp_path / name, kind)
  content = file.path.read_bytes()
  file.path.write_bytes(content[: len(content) // 2])
  with pytest.raises(UserError, match=rf"{name}.*(damaged|cannot be read)"):
    list(file.documents(READING))
