"""Files at URLs (gs://, s3://, https://, memory://, ...), read with fsspec."""

import dataclasses
import glob
import io
import json
import shutil
import tempfile
import urllib.parse
from typing import Any, BinaryIO

from moejax.data.damage import Damaged
from moejax.errors import UserError, reason
from moejax.optional import library

_BUFFER = 2**20
_VERSIONS = ("ETag", "Content-MD5", "Digest", "Last-Modified")  # HTTP headers that identify the version of a file


@dataclasses.dataclass(frozen=True)
class RemotePath:
  """A file at a URL, with the part of the pathlib interface that is needed for reading."""

  url: str

  @property
  def name(self) -> str:
    """Its last part, without the query of a web address."""
    path = _without_query(self.url).rpartition("/")[2]
    return urllib.parse.unquote(path) if _is_web(self.url) else path

  @property
  def size(self) -> int:
    """Size in bytes, or 1 if the server does not report it."""
    size = self._info().get("size")
    return 1 if size is None else int(size)

  @property
  def fingerprint(self) -> str:
    """A string that differs if the file has changed, as far as the file system reports it."""
    facts = {name: str(value) for name, value in self._info().items() if name in _VERSIONS}
    return str(_system(self.url).ukey(self.url)) + (json.dumps(facts, sort_keys=True) if facts else "")

  def open(self, mode: str) -> BinaryIO:
    """Opens the file as a seekable stream of bytes."""
    try:
      system = _system(self.url)
      if _is_web(self.url) and not self._has_ranges(system):
        return _copied(system.open(self.url, mode, block_size=0))
      return io.BufferedReader(_Reported(system.open(self.url, mode), self.url), _BUFFER)
    except Exception as error:  # exceptions differ between protocols
      raise _unreadable(self.url, error) from None

  def _has_ranges(self, system: Any) -> bool:
    """Whether a web server supports range requests."""
    if self.size < 2:
      return False
    try:
      with system.open(self.url, "rb", block_size=1, cache_type="none") as file:
        file.seek(1)
        file.read(1)
    except ValueError:
      return False
    return True

  def _info(self) -> dict[str, Any]:
    try:
      return _system(self.url).info(self.url)
    except Exception as error:
      raise _unreadable(self.url, error) from None

  def is_file(self) -> bool:
    """Whether the file exists."""
    try:
      return bool(_system(self.url).isfile(self.url))
    except Exception as error:
      raise _unreadable(self.url, error) from None

  def with_name(self, name: str) -> "RemotePath":
    """The file `name` beside it."""
    return RemotePath(_without_query(self.url).rpartition("/")[0] + "/" + name)

  def resolve(self) -> "RemotePath":
    """Returns itself, because a URL is absolute."""
    return self

  def __str__(self) -> str:
    return self.url


class _Reported(io.RawIOBase):
  """A remote file that converts the exceptions of its protocol to UserError."""

  def __init__(self, file: Any, url: str):
    self._file, self._url = file, url

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    try:
      content = self._file.read(len(buffer))
    except Exception as error:
      raise _unreadable(self._url, error) from None
    buffer[: len(content)] = content
    return len(content)

  def seek(self, offset: int, whence: int = 0) -> int:
    return self._file.seek(offset, whence)

  def tell(self) -> int:
    return self._file.tell()

  def close(self) -> None:
    self._file.close()
    super().close()


def _copied(file: Any) -> BinaryIO:
  """Copies a file to a temporary file, which is seekable."""
  copy = tempfile.TemporaryFile()  # noqa: SIM115  # its reader closes it
  with file:
    shutil.copyfileobj(file, copy, _BUFFER)
  copy.seek(0)
  return copy


def is_url(source: str) -> bool:
  """Whether the source is a URL, which is read with fsspec."""
  return "://" in source


def list_files(url: str) -> list[tuple[str, RemotePath]]:
  """The files at a URL of a file, a folder or a glob, with names relative to it, sorted by name.

  Raises:
    UserError: If there are none, or the library of the protocol is not installed.
  """
  system = _system(url)
  plain = _without_query(url)
  try:
    if any(sign in plain for sign in ("*[" if _is_web(url) else "*?[")):
      found = [path for path in system.glob(url) if system.isfile(path)]
      parts = url.split("/")
      root = "/".join(parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    elif not _is_web_file(url) and system.isdir(url):
      found, root = system.find(url), url
    elif system.exists(url):
      return [(RemotePath(url).name, RemotePath(url))]
    else:
      found, root = [], url
  except Exception as error:
    raise UserError(f"{url!r} cannot be listed ({reason(error)}); correct the URL or the access rights") from None
  if not found:
    raise UserError(f"{url!r} does not exist or contains no file; correct the URL")
  start = len(str(system._strip_protocol(root)).rstrip("/")) + 1
  return sorted(
    ((str(path)[start:], RemotePath(system.unstrip_protocol(path))) for path in found), key=lambda at: at[0]
  )


def _is_web(url: str) -> bool:
  return url.startswith(("http://", "https://"))


def _is_web_file(url: str) -> bool:
  """Whether a web address is a file instead of a page of links, which fsspec treats as a folder."""
  return _is_web(url) and "." in _without_query(url).rpartition("/")[2]


def _without_query(url: str) -> str:
  return url.partition("#")[0].partition("?")[0] if _is_web(url) else url


def _unreadable(url: str, error: Exception) -> UserError:
  if isinstance(error, UserError):
    return error
  kind = Damaged if isinstance(error, FileNotFoundError) else UserError  # temporary errors are never skipped
  return kind(f"{url} cannot be read ({reason(error)}); correct the URL or the access rights")


def _system(url: str) -> Any:
  try:
    return library("fsspec").core.url_to_fs(url)[0]
  except (ImportError, ValueError) as error:  # fsspec's message names the package that the protocol needs
    if isinstance(error, UserError):
      raise
    raise UserError(f"{url!r}: {reason(error)}") from None
