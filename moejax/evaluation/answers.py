"""Caches answers on disk, so that an interrupted evaluation can resume."""

import hashlib
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from moejax.files import write_whole


class Answers:
  """A file with one JSON line per answer. Each checkpoint needs its own file."""

  def __init__(self, path: pathlib.Path | None):
    """Reads the existing answers. If `path` is None, answers are only kept in memory."""
    self._path = path
    self._known: dict[str, Any] = {}
    if path is None:
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    self._known = dict(_read(path)) if path.exists() else {}
    # Invalid lines, such as an incomplete last line after a kill, are ignored and computed again.
    write_whole(path, "".join(map(_line, self._known.items())))

  def __contains__(self, request: tuple) -> bool:
    return _key(request) in self._known

  def __getitem__(self, request: tuple) -> Any:
    return self._known[_key(request)]

  def add(self, request: tuple, answer: Any) -> None:
    """Stores the answer to a request. Both must be JSON data."""
    key = _key(request)
    self._known[key] = answer
    if self._path is not None:
      with self._path.open("a") as file:
        file.write(_line((key, answer)))


def _line(answered: tuple[str, Any]) -> str:
  return json.dumps([*answered, _check(*answered)]) + "\n"


def _check(key: str, answer: Any) -> int:
  """Checksum of a line."""
  return zlib.crc32(json.dumps([key, answer]).encode())


def _read(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """The answers in the valid lines of a file."""
  for line in path.read_bytes().splitlines():
    try:
      key, answer, check = json.loads(line)
      if check == _check(key, answer):
        yield key, answer
    except (ValueError, TypeError, RecursionError):
      continue


def _key(request: tuple) -> str:
  return hashlib.sha256(json.dumps(request).encode()).hexdigest()
