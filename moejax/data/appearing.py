"""Folders of a cache that appear whole or not at all."""

import contextlib
import pathlib
import shutil
import time
import uuid
from collections.abc import Iterator

_ABANDONED_AFTER_S = 24 * 3600


@contextlib.contextmanager
def appearing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary folder to write into, which becomes `folder` at the end and vanishes on any error."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  _remove_abandoned(folder.parent)
  part = folder.parent / f".partial-{folder.name}-{uuid.uuid4().hex}"
  part.mkdir()
  try:
    yield part
    try:
      part.rename(folder)
    except OSError:
      # Another process was first; its streams are the same.
      if not folder.is_dir():
        raise
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _remove_abandoned(cache: pathlib.Path) -> None:
  """Removes what killed processes left; a process that still writes has touched its files lately."""
  for part in cache.glob(".partial-*"):
    with contextlib.suppress(FileNotFoundError):  # it just became complete, or another process removes it too
      newest = max(path.stat().st_mtime for path in (part, *part.iterdir()))
      if time.time() - newest > _ABANDONED_AFTER_S:
        shutil.rmtree(part, ignore_errors=True)
