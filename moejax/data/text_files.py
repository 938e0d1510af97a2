"""Plain text, decoded in chunks and split into documents of a given length."""

import codecs
import io
import tokenize
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Literal

from moejax.data.damage import Damaged

CHUNK = 2**20
"""Number of bytes that are decoded at a time."""


def decoded(stream: BinaryIO, place: str, kind: str, errors: Literal["strict", "replace"]) -> Iterator[str]:
  """Yields the text of a file in chunks, without a byte order mark and with Unix line endings.

  With Windows line endings, the same text would result in another corpus and another split.

  Args:
    stream: the bytes of the file.
    place: its name in errors.
    kind: its suffix. A .py file is read in the encoding that it declares, other files as UTF-8.
    errors: whether invalid bytes raise an error or are replaced by U+FFFD.

  Raises:
    Damaged: If bytes are invalid in the encoding. The message gives file and line.
  """
  chunk = stream.read(CHUNK)
  encoding = _python_encoding(chunk, place, errors) if kind == ".py" else "utf-8-sig"
  decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(errors), translate=True)
  line = 1
  while True:
    try:
      text = decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
      line += error.object.count(b"\n", 0, error.start)
      raise Damaged(
        f"{place} line {line}: byte {error.object[error.start]:#04x} is not {encoding.removesuffix('-sig')}; "
        "convert the file to UTF-8"
      ) from None
    if text:
      yield text
    if not chunk:
      return
    line += chunk.count(b"\n")
    chunk = stream.read(CHUNK)


def split_text(chunks: Iterable[str], length: int | None) -> Iterator[str]:
  """Splits a text into documents of at most `length` characters, or not at all if `length` is None.

  A document ends at the last blank line in its second half; if there is none, at the last line end there; then at the
  last space; otherwise at the maximum length. The result does not depend on the chunks of the text.
  """
  if length is None:
    if text := "".join(chunks):
      yield text
    return
  text, start = "", 0
  for chunk in chunks:
    text, start = text[start:] + chunk, 0
    while len(text) - start > length:
      stop = _cut(text, start, start + length)
      yield text[start:stop]
      start = stop
  if start < len(text):
    yield text[start:]


def _cut(text: str, start: int, full: int) -> int:
  half = start + (full - start) // 2
  for end in ("\n\n", "\n", " "):
    found = text.rfind(end, half, full)
    if found >= 0:
      return found + len(end)
  return full


def _python_encoding(head: bytes, place: str, errors: str) -> str:
  """The encoding that a Python file declares (PEP 263)."""
  try:
    return tokenize.detect_encoding(io.BytesIO(head).readline)[0]
  except SyntaxError as error:
    if errors == "replace":
      return "utf-8"
    raise Damaged(f"{place} line 1: {error.msg}; convert the file to UTF-8") from None
