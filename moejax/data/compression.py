"""Compressed files as streams of bytes."""

import gzip
import io
import zlib
from typing import BinaryIO

from moejax.optional import library

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Names of compressions by suffix."""
DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error)
"""Exceptions of a damaged gzip file. A damaged zstd file raises an OSError without errno."""

_BUFFER = 2**20


def decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
  """The content of a file whose name ends in `suffix`, one of COMPRESSIONS or empty."""
  match suffix:
    case ".gz":
      return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]  # it has the same interface
    case ".zst":
      # The reader of pyarrow detects truncated files.
      return io.BufferedReader(library("pyarrow").CompressedInputStream(raw, "zstd"), _BUFFER)
    case _:
      return raw
