import os
import pathlib
import subprocess
import sys

import pytest

from moejax.config.data import STANDARD_LIBRARY, Data
from moejax.data import sources
from moejax.data.sources import check_outside, check_sources, documents, source_files
from moejax.errors import UserError


def data(*train, validation=()):
  return Data(train=tuple(map(str, train)), validation=tuple(map(str, validation)), sequence_length=8)


@pytest.fixture
def folder(tmp_path):
  """Files of every kind, some of which are to be left out."""
  for name in ("b.txt", "a.md", "sub/deep/c.py", "sub/d.rst", "e.tex", ".hidden.txt", ".git/f.txt", "sub/empty.py"):
    path = tmp_path / "corpus" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("" if "empty" in name else f"text of {name}\n")
  (tmp_path / "corpus" / "g.jsonl").write_text('{"text": "one"}\n{"text": "two", "id": "second"}\n')
  (tmp_path / "corpus" / "broken.txt").symlink_to(tmp_path / "nowhere.txt")
  return tmp_path / "corpus"


def test_a_folder_gives_its_text_files_by_relative_name_without_hidden_ones(folder):
  assert list(documents(str(folder))) == [
    "text of a.md\n", "text of b.txt\n", "one", "two", "text of sub/d.rst\n", "text of sub/deep/c.py\n"
  ]  # fmt: skip


def test_a_glob_names_its_files_relative_to_the_part_without_magic(folder):
  assert [file.name for file in source_files(f"{folder}/**/*.py")] == ["sub/deep/c.py", "sub/empty.py"]
  assert [file.name for file in source_files(f"{folder}/sub/*")] == ["d.rst", "empty.py"]
  assert [file.name for file in source_files(f"{folder}/[ab].*")] == ["a.md", "b.txt"]


def test_names_do_not_depend_on_where_the_corpus_lies(folder, tmp_path, monkeypatch):
  here = list(documents(str(folder)))
  (tmp_path / "other").mkdir()
  moved = folder.rename(tmp_path / "other" / "place")
  assert list(documents(str(moved))) == here
  monkeypatch.chdir(moved.parent)
  assert list(documents("place")) == here


def test_a_file_gives_itself(folder):
  assert list(documents(str(folder / "b.txt"))) == ["text of b.txt\n"]


def test_a_file_whose_name_has_magic_characters_is_found_as_it_is(tmp_path):
  path = tmp_path / "a[1].txt"
  path.write_text("x")
  assert [file.path for file in source_files(str(path))] == [path]


def test_good_sources_pass(folder):
  check_sources(data(folder, f"{folder}/*.md", STANDARD_LIBRARY))


@pytest.mark.parametrize(
  ("source", "message"),
  [
    (
      "nowhere",
      r"data\.train: '.*nowhere' does not exist; give a file, a folder, a glob or a URL of .*python-standard-library",
    ),
    (
      "e.tex",
      r"data\.train: file '.*e\.tex' is not a supported text file; convert it to \.txt, .*\.arrow",
    ),
    ("*.log", r"data\.train: glob '.*\*\.log' matches no file; correct the pattern"),
    ("*.tex", r"data\.train: glob '.*\*\.tex' matches no \.txt, .* file; correct the pattern"),
    ("pictures", r"data\.train: folder '.*pictures' contains no \.txt, .* file; use another folder"),
    ("empty.txt", r"data\.train: '.*empty\.txt' is empty; give a source with text"),
    ("empties", r"data\.train: '.*empties' is empty \(2 files of 0 bytes\); give a source with text"),
    ("bad.jsonl", r"data\.train: .*bad\.jsonl line 1: not JSON"),
    ("no_text.jsonl", r'data\.train: .*no_text\.jsonl line 1: no string "text" \(its fields: body\)'),
    ("not_gzip.jsonl.gz", r"data\.train: .*not_gzip\.jsonl\.gz: damaged gzip"),
  ],
)
def test_a_bad_source_is_one_line_with_the_remedy(folder, source, message):
  (folder / "empty.txt").touch()
  for name in ("pictures/cat.png", "empties/a.txt", "empties/b.txt"):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
  (folder / "bad.jsonl").write_text("hello\n")
  (folder / "no_text.jsonl").write_text('{"body": "x"}\n')
  (folder / "not_gzip.jsonl.gz").write_text('{"text": "x"}\n')
  with pytest.raises(UserError, match=message) as caught:
    check_sources(data(folder / source))
  assert "\n" not in str(caught.value)


def test_validation_sources_are_checked_too(folder):
  with pytest.raises(UserError, match=r"data\.validation: '.*gone' does not exist"):
    check_sources(data(folder, validation=[folder / "gone"]))


def test_an_empty_name_is_not_the_current_folder():
  with pytest.raises(UserError, match=r"data\.train: a source is an empty string; give a file"):
    check_sources(data(""))


def test_a_file_in_both_splits_is_refused(folder):
  with pytest.raises(UserError, match=r"b\.txt is in data\.train and in data\.validation \(1 such files\)"):
    check_sources(data(f"{folder}/*.[tm]*", validation=[folder / "sub" / ".." / "b.txt"]))


def test_what_is_written_in_a_source_is_refused_where_the_source_would_read_it(folder, monkeypatch):
  for inside in (folder, folder / "run", folder / "sub" / "runs" / "a"):
    with pytest.raises(UserError, match=r"--workdir .* is inside the source .*; choose a directory outside"):
      check_outside([str(folder)], inside, "--workdir")
  monkeypatch.chdir(folder)
  with pytest.raises(UserError, match=r"--workdir run is inside the source '\.'"):
    check_outside(["."], pathlib.Path("run"), "--workdir")
  # Beside it, hidden from it, or of a file that is read alone.
  check_outside([str(folder)], folder.with_name(f"{folder.name}_run"), "--workdir")
  check_outside([str(folder)], folder / ".runs" / "a", "--workdir")
  check_outside([str(folder / "b.txt"), STANDARD_LIBRARY, "seqio:tasks/lm", ""], folder, "--workdir")


def test_only_the_first_line_is_checked(folder):
  (folder / "g.jsonl").write_text('{"text": "one"}\nnot JSON\n')
  check_sources(data(folder / "g.jsonl"))
  with pytest.raises(UserError, match=r"g\.jsonl line 2: not JSON"):
    list(documents(str(folder / "g.jsonl")))


def test_the_standard_library_is_this_pythons_source_without_tests_and_site_packages():
  files = source_files(STANDARD_LIBRARY)
  names = [file.name for file in files]
  assert names == sorted(names)
  assert {"dataclasses.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
  folders = {part for name in names for part in name.split("/")[:-1]}
  assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
  texts = list(documents(STANDARD_LIBRARY))
  assert any("def asdict(" in text for text in texts)
  assert sum(map(len, texts)) > 5e6


def test_a_python_without_sources_says_so(tmp_path, monkeypatch):
  monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
  with pytest.raises(UserError, match=r"this Python has no source files under '.*'; use a Python that has them"):
    check_sources(data(STANDARD_LIBRARY))


def test_files_that_describe_the_installation_are_left_out(tmp_path, monkeypatch):
  for name in ("abc.py", "_sysconfigdata__linux.py", "config-3.11-x86_64/python-config.py", "email/test/x.py"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x = 1\n")
  monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
  assert [file.name for file in source_files(STANDARD_LIBRARY)] == ["abc.py"]


def test_a_badly_encoded_standard_library_file_does_not_stop_a_run(tmp_path, monkeypatch):
  (tmp_path / "bad.py").write_bytes(b"x = '\xe9'\n")
  monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
  assert list(documents(STANDARD_LIBRARY)) == ["x = '�'\n"]


def test_checking_loads_neither_jax_nor_grain():
  program = (
    "import sys\n"
    "from moejax.config import Data\n"
    "from moejax.data import baselines, corpus, packing, sources, tokenizers\n"
    "sources.check_sources(Data(sequence_length=8))\n"
    "print(sorted({name.split('.')[0] for name in sys.modules} & {'jax', 'jaxlib', 'grain', 'tensorflow', 'absl'}))\n"
  )
  root = pathlib.Path(__file__).parents[2]
  environment = os.environ | {"PYTHONPATH": str(root)}
  result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
  assert result.stdout.strip() == "[]"
