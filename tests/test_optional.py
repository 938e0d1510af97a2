"""Libraries that are not there."""

import sys

import pytest

from moejax.config import Data
from moejax.data.sources import check_sources
from moejax.data.tokenizers import make_tokenizer
from moejax.errors import UserError
from moejax.optional import library


def test_a_library_that_is_there_is_its_module():
  assert library("json.decoder") is sys.modules["json.decoder"]


@pytest.mark.parametrize("name", ["no_such_library", "no_such_library.part"])
def test_a_missing_library_says_what_installs_it(name):
  with pytest.raises(UserError, match=r"^no_such_library is not installed; run `pip install moejax\[data\]`$"):
    library(name)


def test_what_a_library_itself_lacks_is_not_blamed_on_it(tmp_path, monkeypatch):
  (tmp_path / "half_installed.py").write_text("import its_own_need\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match="its_own_need"):
    library("half_installed")


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("seqio", {"tokenizer": "seqio:tasks/mine"}),
    ("sentencepiece", {"tokenizer": "{folder}/a.model"}),
    ("tokenizers", {"tokenizer": "{folder}/a.json"}),
    ("tiktoken", {"tokenizer": "{folder}/a.tiktoken"}),
    ("tensorflow_datasets", {"train": "tfds:some_dataset"}),
    ("pyarrow", {"train": "{folder}/a.parquet"}),
    ("pyarrow", {"train": "{folder}/a.jsonl.zst"}),
    ("fsspec", {"train": "memory://some/text.txt"}),
  ],
)
def test_what_needs_the_extra_says_so_where_it_is_not_installed(tmp_path, monkeypatch, name, fields):
  for file in ("a.model", "a.json", "a.tiktoken", "a.parquet", "a.jsonl.zst"):
    (tmp_path / file).write_text("YQ== 0\n")
  monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
  (field, value) = next(iter(fields.items()))
  value = value.format(folder=tmp_path)
  with pytest.raises(UserError, match=rf"{name} is not installed; run `pip install moejax\[data\]`$"):
    if field == "tokenizer":
      make_tokenizer(value)
    else:
      check_sources(Data(train=(value,), sequence_length=8))
