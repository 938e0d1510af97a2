"""A file is written whole or not at all, and nothing else of the package replaces files."""

import errno
import json
import math
import os
import pathlib
import re
import stat
import threading

import pytest

from moejax.files import finite, parse_record, read_json, replacing, write_json, write_whole

ROOT = pathlib.Path(__file__).parents[1]


def files(directory: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_text_and_bytes_are_written_and_nothing_else_is_left(tmp_path):
  write_whole(tmp_path / "text", "é\n")
  write_whole(tmp_path / "bytes", b"\0\r\n")
  write_whole(tmp_path / "text", "è\n")
  assert files(tmp_path) == {"text": "è\n".encode(), "bytes": b"\0\r\n"}


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
  (tmp_path / "plain").touch()
  write_whole(tmp_path / "whole", "")
  modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "whole")}
  assert len(modes) == 1


@pytest.mark.parametrize("failure", ["write", "fsync", "replace"])
def test_on_any_failure_the_old_file_stays_and_no_other_is_left(tmp_path, monkeypatch, failure):
  path = tmp_path / "summary.json"
  write_json(path, {"loss": 1.5})

  def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def killed(source: pathlib.Path, target: pathlib.Path) -> None:
    assert json.loads(source.read_text()) == {"loss": 2.5}, "all is written before the old file goes"
    raise KeyboardInterrupt

  if failure == "replace":
    monkeypatch.setattr(pathlib.Path, "replace", killed)
  elif failure == "fsync":
    monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(KeyboardInterrupt if failure == "replace" else OSError), replacing(path) as part:
    part.write_text(json.dumps({"loss": 2.5}))
    if failure == "write":
      full()
  monkeypatch.undo()
  assert files(tmp_path) == {"summary.json": b'{\n  "loss": 1.5\n}\n'}


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
  done: list[str] = []
  real = os.fsync
  monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append(_kind(descriptor)), real(descriptor)))
  replace = pathlib.Path.replace
  monkeypatch.setattr(pathlib.Path, "replace", lambda old, new: (done.append("replace"), replace(old, new))[1])
  write_whole(tmp_path / "file", "content")
  assert done == ["file", "replace", "directory"]


def _kind(descriptor: int) -> str:
  return "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"


def test_a_link_stays_a_link_and_a_pipe_is_written_in_place(tmp_path):
  target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
  target.write_text("old")
  link.symlink_to(target)
  write_whole(link, "new")
  assert link.is_symlink() and target.read_text() == "new"
  os.mkfifo(pipe)
  got: list[str] = []
  reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
  reader.start()
  write_whole(pipe, "through")
  reader.join(10)
  assert got == ["through"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_json_has_null_for_nan_and_infinity_however_deep(tmp_path):
  content = {"a": [math.nan, {"b": (math.inf, -math.inf, 1.0)}], "c": "nan", "d": 3}
  assert finite(content) == {"a": [None, {"b": [None, None, 1.0]}], "c": "nan", "d": 3}
  write_json(tmp_path / "content.json", content)
  assert json.loads((tmp_path / "content.json").read_text()) == finite(content)


REFUSED = {
  b'{"a": NaN}': "NaN is not a finite number", b'{"a": [-Infinity]}': "-Infinity is not", b"1e999": "1e999 is not",
  b"[" * 100_000: "nested too deeply", b'{"a":' * 60 + b"1" + b"}" * 60: "nested too deeply", b"": "Expecting value",
  b"\x00\x00": ".", b"\xff{": ".", b'{"a": 1': ".", b"9" * 5000: ".",
}  # fmt: skip


@pytest.mark.parametrize("content", REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_json_or_no_number_is_a_value_error(tmp_path, content):
  path = tmp_path / "content.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=REFUSED[content]):
    read_json(path)
  assert parse_record(content) in (None, {"a": None}, {"a": [None]})


def test_every_file_is_written_by_these_functions():
  """Apart from streams that are appended to, folders and files that are renamed as a whole, and probes."""
  writes = re.compile(r"\.write_(text|bytes)\(|os\.(replace|rename)\(|\.rename\(|json\.dump\(|\bpart\w*\.replace\(")
  found = {
    str(path.relative_to(ROOT)): lines
    for path in sorted((ROOT / "moejax").rglob("*.py"))
    if (lines := [line.strip() for line in path.read_text().splitlines() if writes.search(line)])
    and path.name != "files.py"
  }
  assert found == {
    "moejax/data/appearing.py": ["part.rename(folder)"],
    "moejax/lock.py": ["path.rename(aside)"],
    "moejax/training/checkpoint.py": ["return folder.rename(aside).name"],
    "moejax/training/run_directory.py": ["part.rename(checkpoint)", "probe.write_bytes(bytes(4096))"],
  }
