"""Files behind URLs (gs://, s3://, https://, memory://, ...), through fsspec."""

import dataclasses
import glob
from typing import Any, BinaryIO

from moejax.errors import UserError
from moejax.optional import library


@dataclasses.dataclass(frozen=True)
class RemotePath:
  """A file at a URL, with as much of pathlib's interface as reading it takes."""

  url: str

  @property
  def name(self) -> str:
    """Its last part."""
    return self.url.rpartition("/")[2]

  @property
  def size(self) -> int:
    """Bytes; 0 where the server does not say."""
    return int(_system(self.url).size(self.url) or 0)

  @property
  def fingerprint(self) -> str:
    """Differs where the file has changed, as far as the file system can tell."""
    return str(_system(self.url).ukey(self.url))

  def open(self, mode: str) -> BinaryIO:
    """The file's bytes; seekable."""
    try:
      return _system(self.url).open(self.url, mode)
    except OSError as error:
      raise UserError(f"{self.url} cannot be read ({error}); correct the URL or the access") from None

  def resolve(self) -> "RemotePath":
    """Itself: a URL is whole."""
    return self

  def __str__(self) -> str:
    return self.url


def is_url(source: str) -> bool:
  """Whether fsspec should read it rather than the local file system."""
  return "://" in source


def list_files(url: str) -> list[tuple[str, RemotePath]]:
  """Files of a URL that is a file, a folder or a glob, named relative to it, in the order of their names.

  Raises:
    UserError: nothing is there, or the protocol's library is not installed.
  """
  system = _system(url)
  try:
    if glob.has_magic(url):
      found = [path for path in system.glob(url) if system.isfile(path)]
      parts = url.split("/")
      root = "/".join(parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    elif system.isdir(url):
      found, root = system.find(url), url
    elif system.exists(url):
      return [(url.rpartition("/")[2], RemotePath(url))]
    else:
      found, root = [], url
  except Exception as error:  # each protocol raises its own: no access, no network, no such bucket
    raise UserError(f"{url!r} cannot be listed ({error}); correct the URL or the access") from None
  if not found:
    raise UserError(f"{url!r} does not exist or holds no file; correct the URL")
  start = len(str(system._strip_protocol(root)).rstrip("/")) + 1
  return sorted((str(path)[start:], RemotePath(system.unstrip_protocol(path))) for path in found)


def _system(url: str) -> Any:
  try:
    return library("fsspec").core.url_to_fs(url)[0]
  except (ImportError, ValueError) as error:  # fsspec's message names the package that the protocol needs
    if isinstance(error, UserError):
      raise
    raise UserError(f"{url!r}: {error}") from None
