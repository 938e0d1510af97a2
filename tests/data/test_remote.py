"""Files behind URLs; fsspec's file system in memory stands for all of them."""

import uuid

import pytest

from moejax.config import Data
from moejax.data.corpus import build_corpus
from moejax.data.sources import check_sources, documents, source_files
from moejax.data.text import open_text
from moejax.errors import UserError

fsspec = pytest.importorskip("fsspec", reason="of the extra `data`")

FILES = {
  "b.txt": "text of b\n",
  "sub/a.jsonl": '{"text": "one"}\n{"text": "two"}\n',
  "sub/c.tex": "no",
  ".git/hidden.txt": "no",
}


@pytest.fixture
def url():
  """A folder in memory."""
  root = f"memory://{uuid.uuid4().hex}"
  for name, content in FILES.items():
    with fsspec.open(f"{root}/{name}", "w") as file:
      file.write(content)
  return root


def names(source):
  return [file.name for file in source_files(source)]


def test_a_file_a_folder_and_a_glob_are_sources(url):
  assert names(f"{url}/b.txt") == ["b.txt"]
  assert names(url) == names(f"{url}/") == ["b.txt", "sub/a.jsonl"]
  assert names(f"{url}/sub/*.jsonl") == ["a.jsonl"]
  assert names(f"{url}/**/*.jsonl") == ["sub/a.jsonl"]
  assert list(documents(url)) == ["text of b\n", "one", "two"]


def test_a_url_and_a_folder_make_the_same_corpus(url, tmp_path):
  for name, content in FILES.items():
    (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "here" / name).write_text(content)
  validation = tmp_path / "validation.txt"
  validation.write_text("held out")
  remote, local = (
    build_corpus(open_text(Data(train=(source,), validation=(str(validation),), sequence_length=4)), tmp_path / "cache")
    for source in (url, str(tmp_path / "here"))
  )
  assert remote.folder != local.folder
  assert remote.summary() == local.summary()


def test_changed_content_behind_a_url_is_another_version(url):
  (before,) = source_files(f"{url}/b.txt")
  version = before.version
  with fsspec.open(f"{url}/b.txt", "w") as file:
    file.write("text of B\n")
  (after,) = source_files(f"{url}/b.txt")
  assert after.version != version and after.size == before.size


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("{}/nowhere", r"data\.train: 'memory://.*nowhere' does not exist or contains no file; correct the URL"),
    ("{}/*.log", r"data\.train: 'memory://.*\*\.log' does not exist or contains no file"),
    ("{}/sub/c.tex", r"data\.train: 'memory://.*c\.tex' contains no \.txt, .* file; correct the URL"),
    ("nosuch://bucket/a.txt", r"data\.train: 'nosuch://bucket/a\.txt': Protocol not known: nosuch"),
  ],
)
def test_a_bad_url_is_one_line_with_the_remedy(url, source, message):
  with pytest.raises(UserError, match=message) as caught:
    check_sources(Data(train=(source.format(url),), sequence_length=4))
  assert "\n" not in str(caught.value)
