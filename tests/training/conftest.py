"""A corpus that the tests of whole runs share."""

import dataclasses

import pytest
from training_fixtures import tiny

from moejax.data.corpus import build_corpus
from moejax.data.text import open_text

TEXT = "the quick brown fox jumps over the lazy dog; " * 400


@pytest.fixture(scope="session")
def corpus_and_data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  (folder / "train.txt").write_text(TEXT)
  (folder / "validation.txt").write_text(TEXT[:3000])
  data = dataclasses.replace(
    tiny(True).data, train=(str(folder / "train.txt"),), validation=(str(folder / "validation.txt"),)
  )
  return build_corpus(open_text(data), folder / "cache"), data
