"""The text that a directory was begun with."""

import json
import os
import shutil

import pytest

from moejax.config import Data
from moejax.data.corpus import build_corpus
from moejax.data.pack import pack
from moejax.data.text import open_text
from moejax.errors import UserError
from moejax.training.claimed_text import claim_text


@pytest.fixture
def data(tmp_path):
  (tmp_path / "text").mkdir()
  for n in range(30):
    (tmp_path / "text" / f"{n:02}.txt").write_text(f"document {n}")
  (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(9)))
  return Data(train=(str(tmp_path / "text"), str(tmp_path / "more.jsonl")), validation_fraction=0.3, sequence_length=8)


def claim(tmp_path, data):
  claim_text(tmp_path / "run", build_corpus(open_text(data), tmp_path / "run" / "corpus"))


def test_the_same_text_continues_even_where_its_files_were_touched_or_the_cache_is_gone(tmp_path, data):
  claim(tmp_path, data)
  claim(tmp_path, data)
  os.utime(tmp_path / "text" / "03.txt", ns=(0, 0))
  claim(tmp_path, data)
  before = (tmp_path / "run" / "text.json").read_bytes()
  shutil.rmtree(tmp_path / "run" / "corpus")
  claim(tmp_path, data)
  assert (tmp_path / "run" / "text.json").read_bytes() == before


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda folder: (folder / "text" / "03.txt").write_text("document E"), r"text/03\.txt has changed;"),
    (lambda folder: (folder / "text" / "99.txt").write_text("new"), r"text/99\.txt is new;"),
    (lambda folder: (folder / "text" / "07.txt").unlink(), r"text/07\.txt is missing;"),
    (lambda folder: (folder / "more.jsonl").write_text('{"text": "x"}\n'), r"more\.jsonl has changed;"),
    (
      lambda folder: [path.write_text(path.read_text()[::-1]) for path in (folder / "text").iterdir()],
      r"text/\d\d\.txt has changed and 29 other differences;",
    ),
  ],
)
def test_changed_text_is_refused_with_the_name_of_what_has_changed(tmp_path, data, change, message):
  claim(tmp_path, data)
  change(tmp_path)
  for _ in range(2):
    with pytest.raises(UserError, match=rf"run was started with other text: .*{message} restore it to resume, or"):
      claim(tmp_path, data)


def test_a_packed_folder_that_was_packed_anew_is_refused_too(tmp_path, data):
  for text in ("one", "two"):
    shutil.rmtree(tmp_path / "packed", ignore_errors=True)
    (tmp_path / "source.txt").write_text(text)
    pack([str(tmp_path / "source.txt")], "bytes", tmp_path / "packed", processes=1)
    packed = Data(train=(str(tmp_path / "packed"),), validation=(data.train[1],), sequence_length=2)
    if text == "one":
      claim(tmp_path, packed)
  with pytest.raises(UserError, match=r"packed has changed; restore it"):
    claim(tmp_path, packed)
