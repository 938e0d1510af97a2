"""Folders that `datasets` saved, with what it caches beside them."""

import json

import pytest

from moejax.data.sources import documents
from moejax.errors import UserError

pa = pytest.importorskip("pyarrow", reason="of the extra `data`")


def write(path, **columns):
  path.parent.mkdir(parents=True, exist_ok=True)
  content = pa.table(columns)
  with pa.ipc.new_stream(str(path), content.schema) as writer:
    writer.write_table(content)


def save(folder, *shards, **state):
  """As save_to_disk does, with a map's and a filter's result beside it as after load_from_disk."""
  names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
  for name, texts in zip(names, shards, strict=True):
    write(folder / name, text=texts)
  write(folder / "cache-1234.arrow", text=["mapped"])
  write(folder / "cache-5678.arrow", indices=[0])
  (folder / "dataset_info.json").write_text("{}")
  (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], **state}))


def test_what_state_json_lists_is_read_and_nothing_beside_it(tmp_path):
  save(tmp_path / "saved", ["a", "b"], ["c"])
  for source in ("saved", "saved/*.arrow", "saved/*", "**/*"):
    assert list(documents(str(tmp_path / source))) == ["a", "b", "c"]
  assert list(documents(f"file://{tmp_path}/saved")) == ["a", "b", "c"]
  (tmp_path / "other.txt").write_text("other")
  save(tmp_path / "z", ["d"])
  assert list(documents(str(tmp_path))) == ["other", "a", "b", "c", "d"]


def test_a_cache_of_load_dataset_is_read_without_the_results_of_map_and_filter(tmp_path):
  save(tmp_path, ["a"])
  (tmp_path / "state.json").unlink()
  assert list(documents(str(tmp_path))) == ["a"]


def test_files_of_such_names_elsewhere_are_read(tmp_path):
  write(tmp_path / "cache-1.arrow", text=["a"])
  (tmp_path / "state.json").write_text('{"text": "b"}')
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "dataset_info.json").write_text('{"text": "c"}')
  assert list(documents(str(tmp_path))) == ["a", "b", "c"]


def test_one_of_several_splits_must_be_named(tmp_path):
  for split in ("test", "train"):
    save(tmp_path / "saved" / split, [split])
  (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
  assert list(documents(str(tmp_path / "saved" / "train"))) == ["train"]
  for source in (tmp_path / "saved", tmp_path):
    with pytest.raises(UserError, match=r"has the splits of a dataset; give one of .*saved/test, .*saved/train$"):
      list(documents(str(source)))


@pytest.mark.parametrize(
  ("state", "message"),
  [
    (
      '{"_data_files": [{"filename": "gone.arrow"}]}',
      r"gone\.arrow is missing, which is listed in state\.json; restore it",
    ),
    (
      '{"_indices_files": [{"filename": "i.arrow"}]}',
      r"saved with an indices mapping; .*flatten_indices\(\)\.save_to_disk",
    ),
    ("{", r"state\.json is damaged .*; save the dataset again"),
  ],
)
def test_what_cannot_be_read_as_saved_says_what_to_do(tmp_path, state, message):
  save(tmp_path, ["a"])
  (tmp_path / "state.json").write_text(state)
  with pytest.raises(UserError, match=message):
    list(documents(str(tmp_path)))


@pytest.mark.slow
def test_what_datasets_itself_saves_maps_and_filters_is_read_as_it_was_saved(tmp_path):
  datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
  rows = [f"row {n}" for n in range(3000)]
  chosen = datasets.Dataset.from_dict({"text": rows}).shuffle(seed=0).filter(lambda row: "7" in row["text"])
  chosen.save_to_disk(str(tmp_path / "saved"), num_shards=3)
  loaded = datasets.load_from_disk(str(tmp_path / "saved"))
  loaded.map(lambda row: {"text": row["text"].upper()}).filter(lambda row: "1" in row["text"])
  assert list((tmp_path / "saved").glob("cache-*.arrow"))
  assert list(documents(str(tmp_path / "saved"))) == chosen["text"][:]
  datasets.DatasetDict(train=loaded, test=loaded).save_to_disk(str(tmp_path / "both"))
  with pytest.raises(UserError, match=r"give one of .*both/test, .*both/train"):
    list(documents(str(tmp_path / "both")))
  assert list(documents(str(tmp_path / "both" / "train"))) == chosen["text"][:]
