"""Verifies files by their stored hashes. A file is read again only if its size or modification time has changed."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

from moejax.errors import UserError
from moejax.files import read_json, write_json

VERIFIED = "verified.json"


class Verified:
  """The verified hashes of files, cached in a file of a folder."""

  def __init__(self, folder: pathlib.Path):
    self._path = folder / VERIFIED
    self._known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
      content = read_json(self._path)
      self._known = content if isinstance(content, dict) else {}

  def check(self, path: pathlib.Path, expected: str, digest: Callable[[pathlib.Path], str], remedy: str) -> None:
    """Raises UserError with `remedy` unless `digest` of a file equals `expected`. Unchanged files are not read
    again."""
    try:
      status = path.stat()
      facts = [status.st_size, status.st_mtime_ns, expected]
      if self._known.get(str(path.resolve())) == facts:
        return
      found = digest(path)
    except OSError as error:
      raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    if found != expected:
      raise UserError(f"{path} is damaged: its content does not match its hash; {remedy}")
    self._known[str(path.resolve())] = facts
    with contextlib.suppress(OSError):  # if this fails, the file is read again next time
      write_json(self._path, self._known)


def file_hash(path: pathlib.Path) -> str:
  """SHA-256 of a file's bytes, in hexadecimal digits."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def content_checksum(content: dict[str, Any]) -> str:
  """SHA-256 of JSON data, independent of the order of its keys."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
