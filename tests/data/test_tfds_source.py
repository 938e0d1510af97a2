"""TensorFlow datasets by random access, written here in TFDS's own way."""

import pathlib
import sys

import numpy as np
import pytest

from moejax.config import Data
from moejax.data.corpus import build_corpus
from moejax.data.sources import check_sources, documents
from moejax.data.text import open_text
from moejax.errors import UserError

pytestmark = pytest.mark.slow
tfds = pytest.importorskip("tensorflow_datasets", reason="of the extra `data`")
TEXTS = {"train": [f"train {n} größer" for n in range(40)], "test": ["test a", "", "test b"]}


class Tiny(tfds.core.GeneratorBasedBuilder):
  """A dataset of a few lines."""

  VERSION = tfds.core.Version("1.0.0")
  pkg_dir_path = pathlib.Path(__file__).parent

  def _info(self):
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int32)})
    return self.dataset_info_from_configs(features=features)

  def _split_generators(self, manager):
    return {split: self._examples(texts) for split, texts in TEXTS.items()}

  def _examples(self, texts):
    for n, text in enumerate(texts):
      yield n, {"text": text, "n": n}

  def _generate_examples(self, path):
    raise NotImplementedError


def prepare(folder, file_format):
  """The folder of a prepared dataset with a train and a test split."""
  builder = Tiny(data_dir=str(folder), file_format=file_format)
  builder.download_and_prepare()
  return str(builder.data_path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  return prepare(tmp_path_factory.mktemp("tfds"), "array_record")


def texts(source):
  return list(documents(source))


def test_a_split_is_a_source_and_train_is_the_default(dataset):
  # TFDS stores examples in the order of a hash of their keys.
  assert sorted(texts(f"tfds:{dataset}@test")) == ["test a", "test b"]
  assert sorted(texts(f"tfds:{dataset}")) == sorted(TEXTS["train"])
  assert texts(f"tfds:{dataset}@train[:25%]") == texts(f"tfds:{dataset}@train")[:10]


def test_tfrecord_is_read_through_tensorflow_and_says_so_where_there_is_none(tmp_path, monkeypatch):
  pytest.importorskip("tensorflow", reason="of the extra `data`")
  folder = prepare(tmp_path, "tfrecord")
  assert sorted(texts(f"tfds:{folder}@train")) == sorted(TEXTS["train"])
  assert texts(f"tfds:{folder}@train[:25%]") == texts(f"tfds:{folder}@train")[:10]
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  with pytest.raises(UserError, match=r"is not in ArrayRecord, so TensorFlow must read it: .* not installed"):
    check_sources(Data(train=(f"tfds:{folder}",), sequence_length=4))


def test_a_corpus_mixes_it_with_other_text_and_is_read_from_the_cache(dataset, tmp_path):
  (tmp_path / "a.txt").write_text("other")
  sources = (f"tfds:{dataset}", str(tmp_path / "a.txt"))
  data = Data(train=sources, weights=(1.0, 1.0), validation=(f"tfds:{dataset}@test",), sequence_length=4)
  check_sources(data)
  corpus = build_corpus(open_text(data), tmp_path / "cache")
  assert [stream.num_documents for stream in corpus.train] == [40, 1]
  assert corpus.validation.num_documents == 2
  assert build_corpus(open_text(data), tmp_path / "cache").folder == corpus.folder


@pytest.mark.parametrize(
  ("name", "field", "message"),
  [
    ("tfds:{}@validation", "text", r"has no split 'validation' \(its splits: .*test.*\); use one"),
    ("tfds:{}", "body", r"has no text 'body' \(its features: .*text.*\); set data\.text_field"),
    ("tfds:{}", "n", r"has no text 'n'"),
    (
      "tfds:no_such_dataset_at_all",
      "text",
      r"'tfds:no_such_dataset_at_all' cannot be opened \(.*\); use a",
    ),
  ],
)
def test_what_is_not_there_is_one_line_with_the_remedy(dataset, name, field, message):
  with pytest.raises(UserError, match=message) as caught:
    check_sources(Data(train=(name.format(dataset),), text_field=field, sequence_length=4))
  assert "\n" not in str(caught.value)
