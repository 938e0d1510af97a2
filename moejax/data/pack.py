"""Implements `moejax data pack`: tokenizes text to shards in parallel processes."""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal

import numpy as np

from moejax.data.damage import Damaged, Skipped
from moejax.data.documents import READING, Document, Part, Reading, document_key, is_held_out, nulls_warning
from moejax.data.shards import SHARD_TOKENS, ShardWriter, TokenBlock, check_shard_tokens, is_begun, is_packed
from moejax.data.sources import check_outside, source_parts
from moejax.data.tokenizers import Tokenizer, encoded, make_tokenizer
from moejax.errors import UserError
from moejax.interrupts import SIGNALS, blocked, continuing
from moejax.lock import locked

Progress = Callable[[str, float], None]
"""Called with a description of the work and the fraction that is done, 0 to 1."""

Keep = Literal["all", "train", "validation"]
"""Documents to pack: all, or one part of the split by hash that an experiment would use."""

_BLOCK_BYTES = 2**20


def pack(
  sources: Sequence[str],
  tokenizer: str,
  folder: pathlib.Path,
  *,
  reading: Reading = READING,
  keep: Keep = "all",
  validation_fraction: float = 0.05,
  deduplicate: bool = False,
  processes: int | None = None,
  shard_tokens: int = SHARD_TOKENS,
  progress: Progress = lambda what, done: None,
  warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
  """Tokenizes text sources into a packed folder, and returns its manifest. Resumes an interrupted call.

  The result does not depend on the number of processes. Documents keep the order of their sources. With
  `keep="validation"`, they are ordered by a hash, so that any initial part is a random sample; these documents must fit
  in memory.

  Args:
    sources: as in data.train.
    tokenizer: as in data.tokenizer.
    folder: the packed folder, which is created if it is missing.
    reading: text_field, document_length and on_error.
    keep: the documents to pack.
    validation_fraction: as in data.validation_fraction. Not used if `keep` is all.
    deduplicate: whether to pack only the first of several documents with the same text.
    processes: number of tokenizer processes. None uses one per CPU core.
    shard_tokens: number of tokens per shard.
    progress: called regularly with a description and the completed fraction.
    warn: called with each warning.

  Raises:
    UserError: If an option, a source or the tokenizer is not valid, or the folder contains something else or is in use.
  """
  if processes is not None and processes < 1:
    raise UserError(f"processes={processes} must be at least 1")
  if keep != "all" and not 0.0 < validation_fraction <= 0.5:
    raise UserError(f"validation_fraction={validation_fraction} must be above 0 and at most 0.5 to keep {keep}")
  check_outside(sources, folder, "--out")
  encoder = make_tokenizer(tokenizer)
  parts: list[Part] = [part for source in sources for part in source_parts(source)]
  files = [[part.name, part.place, *part.version] for part in parts]
  request: dict[str, Any] = {
    "tokenizer": encoder.identity,
    "text_field": reading.text_field,
    "document_length": reading.document_length,
    "deduplicate": deduplicate,
    "keep": keep if keep == "all" else f"{keep} of validation_fraction={validation_fraction}",
    "sources_sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
  }
  if reading.on_error != "stop":
    request["on_error"] = reading.on_error
  check_shard_tokens(shard_tokens)
  if keep == "validation":
    parts = [_HeldOut(parts, validation_fraction)]

  def keeps(key: int) -> bool:
    return keep != "train" or not is_held_out(key, validation_fraction)

  seen: set[int] | None = set() if deduplicate else None
  # A complete folder is only read, so it may be read-only.
  free = contextlib.nullcontext() if is_packed(str(folder)) else locked(folder, "data pack", warn)
  with free, continuing(lambda: str(folder) if is_begun(folder) else None):
    writer = ShardWriter(folder, request, encoder.vocab_size, shard_tokens)
    if writer.manifest:
      return writer.manifest
    start = writer.position or {"part": 0, "rows": 0, "text_bytes": 0, "nulls": 0, "skipped": [0, []], "sources": []}
    end = start
    total = max(1, sum(part.size for part in parts))
    for text_block, block in _encoded(_blocks(parts, reading, keeps, seen, start), tokenizer, encoder, processes):
      writer.add(block)
      end = text_block.position
      progress(f"{text_block.position['text_bytes']:,} bytes of text", min(1.0, text_block.read / total))
    facts = {"vocab_size": encoder.vocab_size, "tokenizer_name": tokenizer}
    return writer.finish(facts | _told(end, reading, warn))


def _told(end: dict[str, Any], reading: Reading, warn: Callable[[str], None]) -> dict[str, Any]:
  """What the manifest has of the position at the end, and warns of what was left out."""
  if end["nulls"]:
    warn(nulls_warning(end["nulls"], reading.text_field))
  skipped = Skipped(*end.get("skipped", (0, [])))
  if skipped.count:
    warn(skipped.warning())
  return {"skipped": skipped.count} | {name: end[name] for name in ("text_bytes", "nulls", "sources")}


@dataclasses.dataclass(frozen=True)
class _HeldOut:
  """The held-out documents of several parts as one part, in the order of their hash."""

  parts: Sequence[Part]
  fraction: float
  name: str = "held out"
  place: str = ""

  @property
  def size(self) -> int:
    return sum(part.size for part in self.parts)

  @property
  def version(self) -> tuple[int | str, ...]:
    return ()

  def check(self, reading: Reading) -> None:
    for part in self.parts:
      part.check(reading)

  def documents(self, reading: Reading) -> Iterator[tuple[Document, int]]:
    held_out = []
    for part in self.parts:
      for text, _ in part.documents(reading):
        if isinstance(text, Damaged):
          yield text, 0
        elif text and is_held_out(document_key(text), self.fraction):
          held_out.append(text)
    held_out.sort(key=document_key)
    for i, text in enumerate(held_out, 1):
      yield text, self.size * i // len(held_out)


@dataclasses.dataclass(frozen=True)
class _TextBlock:
  texts: list[str]
  position: dict[str, Any]
  """The position after the block: rows of the current part, bytes of text so far, and a record of each complete
  part."""
  read: int
  """Number of source bytes that have been read."""


def _blocks(
  parts: Sequence[Part], reading: Reading, keeps: Callable[[int], bool], seen: set[int] | None, start: dict[str, Any]
) -> Iterator[_TextBlock]:
  """Yields the documents to keep from a position on, in blocks of about a megabyte.

  If `seen` is given, the keys of all documents are added to it, and only the first document with each key is kept.
  """
  texts: list[str] = []
  size, text_bytes, nulls, before = 0, start["text_bytes"], start["nulls"], 0
  skipped, sources = Skipped(*start.get("skipped", (0, []))), list(start["sources"])

  def position(part: int, row: int) -> dict[str, Any]:
    counts = {"text_bytes": text_bytes, "nulls": nulls, "skipped": [skipped.count, [*skipped.first]]}
    return {"part": part, "rows": row, **counts, "sources": [*sources]}

  for index, part in enumerate(parts):
    whole = index < start["part"]
    # When resuming, a partial part is read again to compute its hash, and all parts are read again if `seen` is needed.
    # Only documents after the position are tokenized.
    if whole and seen is None:
      before += part.size
      continue
    done = start["rows"] if index == start["part"] else 0
    digest, count = hashlib.sha256(), 0
    for row, (text, read) in enumerate(part.documents(reading), 1):
      fresh = row > done and not whole
      nulls += fresh and text is None
      if fresh and isinstance(text, Damaged):
        skipped.add(text)
      if not isinstance(text, str) or not text:
        continue
      key = document_key(text)
      count += 1
      digest.update(key.to_bytes(8, "big"))
      first = seen is None or key not in seen
      if seen is not None:
        seen.add(key)
      if not (fresh and first and keeps(key)):
        continue
      texts.append(text)
      size += len(text.encode())
      if size >= _BLOCK_BYTES:
        text_bytes += size
        yield _TextBlock(texts, position(index, row), before + read)
        texts, size = [], 0
    if not whole:
      sources.append({"name": part.name, "place": part.place, "documents": count, "sha256": digest.hexdigest()})
    before += part.size
  text_bytes += size
  yield _TextBlock(texts, position(len(parts), 0), before)


def _encoded(
  blocks: Iterator[_TextBlock], name: str, tokenizer: Tokenizer, processes: int | None
) -> Iterator[tuple[_TextBlock, TokenBlock]]:
  """Yields each block with its tokens, in order. A few blocks per process are tokenized ahead."""
  processes = processes or os.cpu_count() or 1
  if processes == 1:
    for block in blocks:
      yield block, _packed(block, *_encode_with(tokenizer, block.texts))
    return
  # Do not fork: this is not safe in a process with threads, such as those of JAX or of a tokenizer.
  context = multiprocessing.get_context("spawn")
  with ProcessPoolExecutor(processes, context, _start_process, (name, tokenizer.identity)) as pool:
    waiting: deque[tuple[_TextBlock, Any]] = deque()
    try:
      for block in blocks:
        with blocked():  # block signals in a new process until it ignores Ctrl-C
          waiting.append((block, pool.submit(_encode, block.texts)))
        if len(waiting) > 3 * processes:
          block, future = waiting.popleft()
          yield block, _packed(block, *future.result())
      for block, future in waiting:
        yield block, _packed(block, *future.result())
    finally:
      pool.shutdown(cancel_futures=True)


def _packed(block: _TextBlock, tokens: np.ndarray, lengths: np.ndarray) -> TokenBlock:
  return TokenBlock(tokens, lengths, None, block.position)


def _encode_with(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
  """The tokens [n] of all documents, each preceded by BEGIN, and their lengths int64 [d]."""
  documents = [np.concatenate([[np.int32(tokenizer.begin)], *encoded(tokenizer, text)]) for text in texts]
  tokens = np.concatenate(documents) if documents else np.zeros(0, np.int32)
  return tokens, np.array([len(document) for document in documents], np.int64)


_PROCESS: dict[str, Tokenizer] = {}
"""The tokenizer of a process of the pool."""


def _start_process(name: str, identity: str) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is sent to all processes, but only the parent handles it
  signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
  parent = multiprocessing.parent_process()
  assert parent
  threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
  tokenizer = make_tokenizer(name)
  if tokenizer.identity != identity:
    raise UserError(f"data.tokenizer={name!r} changed while it was in use; run the command again")
  _PROCESS["tokenizer"] = tokenizer


def _end_with(parent: Any) -> None:
  """Ends this process when its parent ends. After a kill, it would otherwise wait for work forever."""
  parent.join()
  os._exit(1)


def _encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
  return _encode_with(_PROCESS["tokenizer"], texts)
