"""Writes files atomically: after a kill or with a full disk, a file has either its old or its new content.

In a program with several processes, only the first writes, since all have the same content.
"""

import contextlib
import json
import math
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

from moejax import processes
from moejax.config.plain import parse_json


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a file durably and atomically. Text is encoded as UTF-8.

  Raises:
    OSError: If the file cannot be written. The old file is unchanged.
  """
  if not processes.is_first():
    return
  with replacing(path) as part:
    part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a JSON file as `write_whole`; NaN and infinity become null."""
  write_whole(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def read_json(path: pathlib.Path) -> Any:
  """Reads a JSON file.

  Raises:
    OSError: If the file cannot be read.
    ValueError: If its content is refused by `parse_json`.
  """
  return parse_json(path.read_bytes())


def parse_record(line: bytes | str) -> dict[str, Any] | None:
  """The object in a line of a JSONL file, in which NaN and infinity become None. None if the line is damaged."""
  try:
    content = parse_json(line, float)
  except ValueError:
    return None
  return finite(content) if isinstance(content, dict) else None


def finite(content: Any) -> Any:
  """Replaces NaN and infinity by None, since JSON cannot represent them."""
  if isinstance(content, dict):
    return {name: finite(value) for name, value in content.items()}
  if isinstance(content, list | tuple):
    return [finite(value) for value in content]
  return None if isinstance(content, float) and not math.isfinite(content) else content


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the path of a temporary file in the same directory, which replaces `path` when the block ends.

  The content is synchronized to disk before the file is renamed, so that a power failure leaves no empty file. The
  temporary file is removed if the block raises an exception. A pipe or device, such as /dev/stdout, is written
  directly.
  """
  if path.exists() and not path.is_file():
    yield path
    return
  path = path.resolve()  # replace the target of a symbolic link, not the link
  part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
  try:
    yield part
    _sync(part)
    part.replace(path)
  except BaseException:
    part.unlink(missing_ok=True)
    raise
  with contextlib.suppress(OSError):  # some network file systems do not synchronize directories
    _sync(path.parent)


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
