"""Texts in Parquet and Arrow files."""

import pytest

from moejax.data.documents import Document, SourceFile, read_documents
from moejax.data.sources import documents, source_files
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
def test_each_row_is_a_document_named_by_its_number(tmp_path, kind, name):
  read = [document for document, _ in read_documents(write(tmp_path / name, kind))]
  assert read == [Document(f"{name}#{number}", text) for number, text in enumerate(ROWS, 1)]


@KINDS
def test_the_bytes_read_so_far_grow_to_the_size_of_the_file(tmp_path, kind, name):
  file = write(tmp_path / name, kind)
  done = [read for _, read in read_documents(file)]
  assert done == sorted(done)
  assert 0 < done[0] < done[-1] <= file.size
  assert done[-1] > 0.9 * file.size


@KINDS
def test_rows_without_text_are_no_documents(tmp_path, kind, name):
  file = write(tmp_path / name, kind, table(text=["a", None, "", "b"]))
  assert [document for document, _ in read_documents(file)] == [Document(f"{name}#1", "a"), Document(f"{name}#4", "b")]


@KINDS
def test_a_missing_column_names_those_there_are(tmp_path, kind, name):
  file = write(tmp_path / name, kind, table(content=["a"], n=[1]))
  assert [document.text for document, _ in read_documents(file, "content")] == ["a"]
  with pytest.raises(UserError, match=rf"{name}: no column 'text' \(its columns: content, n\); set data\.text_field"):
    list(read_documents(file))
  with pytest.raises(UserError, match=rf"{name}: column 'n' holds int64, not strings"):
    list(read_documents(file, "n"))


@KINDS
def test_a_damaged_file_is_named(tmp_path, kind, name):
  file = write(tmp_path / name, kind)
  content = file.path.read_bytes()
  file.path.write_bytes(content[: len(content) // 2])
  with pytest.raises(UserError, match=rf"{name}.*(damaged|cannot be read)"):
    list(read_documents(file))


def test_a_folder_that_datasets_saved_is_a_source_and_one_of_several_splits_must_be_named(tmp_path):
  for split in ("test", "train"):
    (tmp_path / "saved" / split).mkdir(parents=True)
    for shard in range(2):
      write(tmp_path / "saved" / split / f"data-0000{shard}-of-00002.arrow", "stream", table(text=[f"{split} {shard}"]))
    (tmp_path / "saved" / split / "state.json").write_text("{}")
  (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
  assert [document.text for document in documents(str(tmp_path / "saved" / "train"))] == ["train 0", "train 1"]
  with pytest.raises(UserError, match=r"holds the splits of a dataset; name one of .*saved/test, .*saved/train$"):
    source_files(str(tmp_path / "saved"))


@pytest.mark.slow
def test_what_datasets_itself_saves_is_read_as_it_was(tmp_path):
  datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
  saved = datasets.Dataset.from_dict({"text": ROWS}).shuffle(seed=0).filter(lambda row: "7" in row["text"])
  saved.save_to_disk(str(tmp_path / "saved"), num_shards=3)
  assert [document.text for document in documents(str(tmp_path / "saved"))] == saved["text"][:]
