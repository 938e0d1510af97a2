"""Writes folders atomically."""

import contextlib
import pathlib
import shutil
import time
import uuid
from collections.abc import Iterator

_ABANDONED_AFTER_S = 24 * 3600


@contextlib.contextmanager
def appearing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary folder to write to, which is renamed to `folder` at the end and removed on any error."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  _remove_abandoned(folder.parent)
  part = folder.parent / f".partial-{folder.name}-{uuid.uuid4().hex}"
  part.mkdir()
  try:
    yield part
    try:
      part.rename(folder)
    except OSError:
      # Another process wrote the same content first.
      if not folder.is_dir():
        raise
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _remove_abandoned(cache: pathlib.Path) -> None:
  """Removes folders that killed processes left. A process that still writes has modified its files recently."""
  for part in cache.glob(".partial-*"):
    with contextlib.suppress(FileNotFoundError):  # it was just completed, or removed by another process
      newest = max(path.stat().st_mtime for path in (part, *part.iterdir()))
      if time.time() - newest > _ABANDONED_AFTER_S:
        shutil.rmtree(part, ignore_errors=True)
