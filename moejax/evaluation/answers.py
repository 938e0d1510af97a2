"""A cache of answers on disk, from which an interrupted evaluation resumes."""

import hashlib
import json
import pathlib
from typing import Any

from moejax.files import write_whole


class Answers:
  """A file of JSON lines, one an answer. Answers of another model or checkpoint belong in another file."""

  def __init__(self, path: pathlib.Path | None):
    """Reads what is there; `path` None keeps answers in memory only."""
    self._path = path
    self._known: dict[str, Any] = {}
    if path is None:
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    for line in whole.decode().splitlines():
      key, answer = json.loads(line)
      self._known[key] = answer
    # A kill leaves half a line at the end.
    write_whole(path, whole + b"\n" if whole else b"")

  def __contains__(self, request: tuple) -> bool:
    return _key(request) in self._known

  def __getitem__(self, request: tuple) -> Any:
    return self._known[_key(request)]

  def add(self, request: tuple, answer: Any) -> None:
    """Keeps the answer to a request, both plain data."""
    key = _key(request)
    self._known[key] = answer
    if self._path is not None:
      with self._path.open("a") as file:
        file.write(json.dumps([key, answer]) + "\n")


def _key(request: tuple) -> str:
  return hashlib.sha256(json.dumps(request).encode()).hexdigest()
