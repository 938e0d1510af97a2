"""Tokenizes text to shards in parallel processes, as `moejax data pack` does."""

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

from moejax.data.documents import READING, Part, Reading, document_key, is_held_out, nulls_warning
from moejax.data.shards import SHARD_TOKENS, ShardWriter, TokenBlock, check_shard_tokens, is_begun, is_packed
from moejax.data.sources import check_outside, source_parts
from moejax.data.tokenizers import Tokenizer, encoded, make_tokenizer
from moejax.errors import UserError
from moejax.interrupts import SIGNALS, blocked, continuing
from moejax.lock import locked

Progress = Callable[[str, float], None]
"""Called with a description of the work and the fraction that is done, 0 to 1."""

Keep = Literal["all", "train", "validation"]
"""Documents to pack: all, or one side of the split by hash that an experiment would make."""

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
  """Tokenizes sources of text into a packed folder, and returns its manifest. Resumes an interrupted call.

  What is written does not depend on the number of processes. Documents keep the order of their sources, but those that
  are held out come in the order of their hash, so that any beginning of them is a fair sample; they must fit in memory.

  Args:
    sources: as in data.train.
    tokenizer: as data.tokenizer.
    folder: the packed folder, which is created if it is missing.
    reading: text_field and document_length.
    keep: the documents to pack.
    validation_fraction: as data.validation_fraction. Unused if `keep` is all.
    deduplicate: whether to pack only the first of documents with exactly the same text.
    processes: number of tokenizer processes; None: one per CPU core.
    shard_tokens: tokens in a shard.
    progress: called regularly with the progress.
    warn: called with each warning.

  Raises:
    UserError: an option, a source or the tokenizer is bad, or the folder holds something else or is being packed.
  """
  if processes is not None and processes < 1:
    raise UserError(f"{processes} processes: there must be one or more")
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
  check_shard_tokens(shard_tokens)
  if keep == "validation":
    parts = [_HeldOut(parts, validation_fraction)]

  def keeps(key: int) -> bool:
    return keep != "train" or not is_held_out(key, validation_fraction)

  seen: set[int] | None = set() if deduplicate else None
  # What is packed already is only read, and may lie where nothing can be written.
  free = contextlib.nullcontext() if is_packed(str(folder)) else locked(folder, "data pack", warn)
  with free, continuing(lambda: str(folder) if is_begun(folder) else None):
    writer = ShardWriter(folder, request, encoder.vocab_size, shard_tokens)
    if writer.manifest:
      return writer.manifest
    start = writer.position or {"part": 0, "rows": 0, "text_bytes": 0, "nulls": 0, "sources": []}
    end = start
    total = max(1, sum(part.size for part in parts))
    for text_block, block in _encoded(_blocks(parts, reading, keeps, seen, start), tokenizer, encoder, processes):
      writer.add(block)
      end = text_block.position
      progress(f"{text_block.position['text_bytes']:,} bytes of text", min(1.0, text_block.read / total))
    if end["nulls"]:
      warn(nulls_warning(end["nulls"], reading.text_field))
    facts = {"vocab_size": encoder.vocab_size, "tokenizer_name": tokenizer}
    return writer.finish(facts | {name: end[name] for name in ("text_bytes", "nulls", "sources")})


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

  def documents(self, reading: Reading) -> Iterator[tuple[str | None, int]]:
    every = (text for part in self.parts for text, _ in part.documents(reading) if text)
    held_out = sorted((text for text in every if is_held_out(document_key(text), self.fraction)), key=document_key)
    for i, text in enumerate(held_out, 1):
      yield text, self.size * i // len(held_out)


@dataclasses.dataclass(frozen=True)
class _TextBlock:
  texts: list[str]
  position: dict[str, Any]
  """The position after the block: rows done of a part, bytes of text so far, and a record of each whole part."""
  read: int
  """Number of source bytes that are read."""


def _blocks(
  parts: Sequence[Part], reading: Reading, keeps: Callable[[int], bool], seen: set[int] | None, start: dict[str, Any]
) -> Iterator[_TextBlock]:
  """The documents from a position on whose key is kept, about a megabyte at a time.

  `seen`, where there is one, gets the keys of all documents, and only the first of each key is kept.
  """
  texts: list[str] = []
  size, text_bytes, nulls, before = 0, start["text_bytes"], start["nulls"], 0
  sources = list(start["sources"])
  for index, part in enumerate(parts):
    whole = index < start["part"]
    # What is done is read again where that is needed: a part that is half done for its hash, all parts for what `seen`
    # must hold. Only what follows is tokenized.
    if whole and seen is None:
      before += part.size
      continue
    done = start["rows"] if index == start["part"] else 0
    digest, count = hashlib.sha256(), 0
    for row, (text, read) in enumerate(part.documents(reading), 1):
      fresh = row > done and not whole
      nulls += fresh and text is None
      if not text:
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
        position = {"part": index, "rows": row, "text_bytes": text_bytes, "nulls": nulls, "sources": [*sources]}
        yield _TextBlock(texts, position, before + read)
        texts, size = [], 0
    if not whole:
      sources.append({"name": part.name, "place": part.place, "documents": count, "sha256": digest.hexdigest()})
    before += part.size
  end = {"part": len(parts), "rows": 0, "text_bytes": text_bytes + size, "nulls": nulls, "sources": sources}
  yield _TextBlock(texts, end, before)


def _encoded(
  blocks: Iterator[_TextBlock], name: str, tokenizer: Tokenizer, processes: int | None
) -> Iterator[tuple[_TextBlock, TokenBlock]]:
  """Each block with its tokens, in order; a few blocks are under way in every process."""
  processes = processes or os.cpu_count() or 1
  if processes == 1:
    for block in blocks:
      yield block, _packed(block, *_encode_with(tokenizer, block.texts))
    return
  # Not forked: a process with threads, as of JAX or a tokenizer, must not be.
  context = multiprocessing.get_context("spawn")
  with ProcessPoolExecutor(processes, context, _start_process, (name, tokenizer.identity)) as pool:
    waiting: deque[tuple[_TextBlock, Any]] = deque()
    try:
      for block in blocks:
        with blocked():  # a process that starts now must live until it ignores Ctrl-C
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
  """All documents' tokens [n], each document after its BEGIN, and their lengths int64 [d]."""
  documents = [np.concatenate([[np.int32(tokenizer.begin)], *encoded(tokenizer, text)]) for text in texts]
  tokens = np.concatenate(documents) if documents else np.zeros(0, np.int32)
  return tokens, np.array([len(document) for document in documents], np.int64)


_PROCESS: dict[str, Tokenizer] = {}
"""The tokenizer of this process of a pool."""


def _start_process(name: str, identity: str) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent alone decides what it means
  signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
  parent = multiprocessing.parent_process()
  assert parent
  threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
  tokenizer = make_tokenizer(name)
  if tokenizer.identity != identity:
    raise UserError(f"data.tokenizer={name!r} changed while it was in use; start again")
  _PROCESS["tokenizer"] = tokenizer


def _end_with(parent: Any) -> None:
  """A parent that is killed cannot end its processes, which would wait for work for ever."""
  parent.join()
  os._exit(1)


def _encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
  return _encode_with(_PROCESS["tokenizer"], texts)
