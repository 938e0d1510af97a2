"""Token shards: a stream of tokens in ArrayRecord files, written once and read by random access.

A packed folder holds tokens-NNNNN.array_record  records of RECORD_TOKENS little-endian tokens each; all shards except
the last have the same number of records, so that the position of a token can be computed from its index starts
int64: index of the BEGIN of each document, then the number of tokens prefixes                   int64, optional: number
of tokens after each BEGIN that are not predicted keys                       uint64: a hash of the tokens of each
document, to find equal documents manifest.json              sources, options, counts, and a hash of the tokens of each
shard; written last

While it is being written, progress.json and carry-NNNNN hold the state from which packing resumes.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from moejax.data.integrity import Verified, content_checksum, file_hash
from moejax.data.token_stream import TokenStream, token_dtype, tokens_key
from moejax.errors import UserError, reason
from moejax.files import read_json, replacing, write_json, write_whole
from moejax.lock import LOCK

FORMAT = 2
RECORD_TOKENS = 1024
SHARD_TOKENS = 2**25
"""Default number of tokens per shard: 64 MB of 16-bit ids."""

MANIFEST, PROGRESS = "manifest.json", "progress.json"
MANIFEST_TYPES = {
  "tokenizer": str, "dtype": str, "prefixes": bool, "documents": int, "tokens": int, "shard_tokens": int,
  "sha256": str, "shards": list,
}  # fmt: skip
DTYPES = ("<u2", "<u4")
AGAIN = "copy the folder again, or pack the text again"
RECORDS_AT_ONCE = 2048


def is_packed(source: str) -> bool:
  """Whether a source is a folder that `moejax data pack` wrote."""
  return bool(source) and (pathlib.Path(source).expanduser() / MANIFEST).is_file()


def is_begun(folder: pathlib.Path) -> bool:
  """Whether a folder has complete shards from which packing can resume."""
  return (folder / PROGRESS).is_file()


def check_shard_tokens(shard_tokens: int) -> None:
  """Raises UserError unless shards of this many tokens consist of whole records."""
  if shard_tokens < 1 or shard_tokens % RECORD_TOKENS:
    raise UserError(
      f"shard_tokens={shard_tokens} is not a multiple of {RECORD_TOKENS}; use a multiple of {RECORD_TOKENS}"
    )


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """Reads manifest.json.

  Raises:
    UserError: If it does not exist, is damaged, or has another format.
  """
  try:
    manifest = read_json(folder / MANIFEST)
  except (OSError, ValueError) as error:
    raise UserError(f"{folder} is not a packed folder ({error}); write it with `moejax data pack`") from None
  if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
    there = manifest.get("format") if isinstance(manifest, dict) else None
    raise UserError(f"{folder} has format {there} instead of {FORMAT}; pack it again")
  if damage := _damage(manifest):
    raise UserError(f"{folder / MANIFEST} is damaged: {damage}; {AGAIN}")
  return manifest


def _damage(manifest: dict[str, Any]) -> str | None:
  """Describes the damage of a manifest, or returns None."""
  content = {name: value for name, value in manifest.items() if name != "checksum"}
  if "checksum" in manifest and manifest["checksum"] != content_checksum(content):
    return "its content does not match its checksum"
  for name, kind in MANIFEST_TYPES.items():
    if not isinstance(manifest.get(name), kind):
      return f"{name} is {manifest.get(name)!r}"
  for shard in manifest["shards"]:
    named = isinstance(shard, dict) and re.fullmatch(r"tokens-\d+\.array_record", str(shard.get("file")))
    if not named or not isinstance(shard.get("tokens"), int) or not isinstance(shard.get("sha256"), str):
      return f"a shard is {shard!r}"
  sizes = [shard["tokens"] for shard in manifest["shards"]]
  if sum(sizes) != manifest["tokens"] or any(size != manifest["shard_tokens"] for size in sizes[:-1]):
    return "the sum of the tokens of its shards does not match"
  if manifest["shard_tokens"] < 1 or manifest["shard_tokens"] % RECORD_TOKENS or manifest["documents"] < 1:
    return f"shard_tokens is {manifest['shard_tokens']} and documents is {manifest['documents']}"
  return None if manifest["dtype"] in DTYPES else f"dtype is {manifest['dtype']!r}"


def open_packed(folder: pathlib.Path, tokenizer_identity: str, padding: int) -> TokenStream:
  """Opens the stream of a packed folder. Reads only its manifest.

  Raises:
    UserError: If it was packed with another tokenizer, or is incomplete or damaged.
  """
  manifest = read_manifest(folder)
  if manifest["tokenizer"] != tokenizer_identity:
    raise UserError(
      f"{folder} was packed with the tokenizer {manifest['tokenizer']!r}, but data.tokenizer is "
      f"{tokenizer_identity!r}; use the same tokenizer, or pack the text again"
    )
  for shard in manifest["shards"]:
    if not (folder / shard["file"]).is_file():
      raise UserError(f"{folder / shard['file']} is missing; restore it, or pack the text again")
  starts = _read_index(folder, "starts", manifest["documents"] + 1)
  if starts[-1] != manifest["tokens"]:
    raise UserError(f"{folder / 'starts'} does not match {folder / MANIFEST}; {AGAIN}")
  prefixes = _read_index(folder, "prefixes", manifest["documents"]) if manifest["prefixes"] else None
  return TokenStream(ShardedTokens(folder, manifest), starts, padding, prefixes)


def check_packed(folder: pathlib.Path, vocab_size: int, verified: Verified) -> None:
  """Compares the files of a packed folder with the hashes in its manifest. Files that were verified are not read again.

  Raises:
    UserError: If a file is damaged, or contains ids outside the vocabulary.
  """
  manifest = read_manifest(folder)
  dtype = np.dtype(manifest["dtype"])

  def shard_hash(path: pathlib.Path) -> str:
    """Hash of the tokens of a shard."""
    digest = hashlib.sha256()
    for tokens in _read_shard(path, dtype):
      if len(tokens) and tokens.max() >= vocab_size:
        raise UserError(f"{path} has the id {tokens.max()}, but the tokenizer has {vocab_size} tokens; pack it again")
      digest.update(tokens.tobytes())
    return digest.hexdigest()

  for shard in manifest["shards"]:
    verified.check(folder / shard["file"], shard["sha256"], shard_hash, AGAIN)
  for name in ("starts", "prefixes") if manifest["prefixes"] else ("starts",):
    verified.check(folder / name, manifest["sha256"], lambda _: _content_hash(folder, manifest["shards"]), AGAIN)


def _read_shard(path: pathlib.Path, dtype: np.dtype) -> Iterator[np.ndarray]:
  """Yields the records of a shard, a few megabytes at a time."""
  try:
    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    for start in range(0, reader.num_records(), RECORDS_AT_ONCE):
      records = reader.read(range(start, min(start + RECORDS_AT_ONCE, reader.num_records())))
      yield np.frombuffer(b"".join(records), dtype)
    reader.close()
  except (RuntimeError, ValueError, IndexError) as error:
    raise UserError(f"{path} is damaged ({reason(error)[:100]}); {AGAIN}") from error


def _read_index(folder: pathlib.Path, name: str, length: int) -> np.ndarray:
  """int64 [length]: the content of an index file."""
  path = folder / name
  try:
    size = path.stat().st_size
    if size != 8 * length:
      raise UserError(
        f"{path} does not match {folder / MANIFEST}: it has {size} bytes instead of {8 * length}; {AGAIN}"
      )
    return np.memmap(path, "<u8" if name == "keys" else "<i8", "r")
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from error


def _content_hash(folder: pathlib.Path, shards: list[dict[str, Any]]) -> str:
  """A hash that is equal for two folders with the same documents, tokens and shard size."""
  whole = hashlib.sha256()
  for name in ("starts", "prefixes"):
    if (folder / name).exists():
      whole.update(bytes.fromhex(file_hash(folder / name)))
  for shard in shards:
    whole.update(bytes.fromhex(shard["sha256"]))
  return whole.hexdigest()


def read_keys(folder: pathlib.Path) -> np.ndarray:
  """uint64 [d]: tokens_key of each document of a packed folder."""
  return _read_index(folder, "keys", read_manifest(folder)["documents"])


def mean_length(folder: pathlib.Path) -> float:
  """Mean number of tokens per document in a packed folder."""
  manifest = read_manifest(folder)
  return manifest["tokens"] / manifest["documents"]


class ShardedTokens:
  """The tokens of a packed folder as an array [n] that supports slices from any number of threads."""

  def __init__(self, folder: pathlib.Path, manifest: dict[str, Any]):
    self._paths = [str(folder / shard["file"]) for shard in manifest["shards"]]
    self._records_per_shard = manifest["shard_tokens"] // RECORD_TOKENS
    self._length = manifest["tokens"]
    self.dtype = np.dtype(manifest["dtype"])
    self._lock = threading.Lock()
    self._readers: dict[int, ArrayRecordReader] = {}

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, where: slice) -> np.ndarray:
    start, stop, step = where.indices(self._length)
    assert step == 1, where
    first, last = start // RECORD_TOKENS, -(-stop // RECORD_TOKENS)
    content = b"".join(self._record(record) for record in range(first, last))
    return np.frombuffer(content, self.dtype)[start - first * RECORD_TOKENS : stop - first * RECORD_TOKENS]

  def _record(self, record: int) -> bytes:
    shard, index = divmod(record, self._records_per_shard)
    try:
      return self._reader(shard).read([index])[0]
    except (RuntimeError, ValueError, IndexError) as error:  # the file was deleted or changed since it was verified
      raise UserError(f"{self._paths[shard]} cannot be read ({reason(error)[:100]}); {AGAIN}") from error

  def _reader(self, shard: int) -> ArrayRecordReader:
    if shard not in self._readers:
      with self._lock:
        if shard not in self._readers:
          # No read-ahead: windows are read in a shuffled order.
          self._readers[shard] = ArrayRecordReader(self._paths[shard], "readahead_buffer_size:0,max_parallelism:0")
    return self._readers[shard]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenBlock:
  """Consecutive documents, each of which starts with BEGIN."""

  tokens: np.ndarray
  """Token ids [n]."""
  lengths: np.ndarray
  """int64 [d]: number of tokens of each document, including BEGIN."""
  prefixes: np.ndarray | None
  """int64 [d] or None: number of tokens after each BEGIN that are not predicted."""
  position: Any
  """JSON data with which the caller can continue after this block."""


class ShardWriter:
  """Writes a packed folder, block by block. Resumes after an interruption.

  The content depends only on the documents, not on how they are split into blocks, nor on interruptions.
  """

  def __init__(self, folder: pathlib.Path, request: dict[str, Any], vocab_size: int, shard_tokens: int = SHARD_TOKENS):
    """Opens the folder.

    Args:
      folder: the folder, which is created if necessary.
      request: JSON data that determines the content. It must be equal when packing resumes.
      vocab_size: all ids are below this number.
      shard_tokens: number of tokens per shard, a multiple of RECORD_TOKENS.

    Raises:
      UserError: If the folder contains something else.
    """
    check_shard_tokens(shard_tokens)
    self._folder = folder
    self._dtype = np.dtype(token_dtype(vocab_size))
    self._shard_tokens = shard_tokens
    self._request = json.loads(json.dumps({"format": FORMAT, **request, "shard_tokens": shard_tokens}))
    self.manifest = self._finished()
    """The content of manifest.json if the folder is complete."""
    self._state: dict[str, Any] = {"position": None, "shards": [], "documents": 0, "tokens": 0}
    self._pending: list[np.ndarray] = []
    if self.manifest:
      return
    folder.mkdir(parents=True, exist_ok=True)
    self._resume()
    self._num_documents, self._num_tokens = self._state["documents"], self._state["tokens"]
    self._num_pending = sum(map(len, self._pending))
    self._starts, self._prefixes, self._keys = self._indices = tuple(
      _open_index(folder / name, self._num_documents) for name in ("starts", "prefixes", "keys")
    )

  @property
  def position(self) -> Any:
    """The position of the last block that is stored, or None at the start."""
    return self._state["position"]

  def add(self, block: TokenBlock) -> None:
    """Appends the documents of a block."""
    bounds = np.cumsum(block.lengths, dtype=np.int64)
    self._starts.write((self._num_tokens + bounds - block.lengths).astype("<i8").tobytes())
    if block.prefixes is not None:
      self._prefixes.write(block.prefixes.astype("<i8").tobytes())
    keys = [tokens_key(block.tokens[stop - length : stop]) for stop, length in zip(bounds, block.lengths, strict=True)]
    self._keys.write(np.array(keys, "<u8").tobytes())
    self._num_documents += len(block.lengths)
    self._num_tokens += len(block.tokens)
    self._pending.append(block.tokens.astype(self._dtype))
    self._num_pending += len(block.tokens)
    if self._num_pending < self._shard_tokens:
      return
    pending = np.concatenate(self._pending)
    while len(pending) >= self._shard_tokens:
      self._write_shard(pending[: self._shard_tokens])
      pending = pending[self._shard_tokens :]
    self._pending, self._num_pending = [pending], len(pending)
    self._save_progress(pending, block.position)

  def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes the remaining tokens and manifest.json, which includes `facts`. Returns the content of manifest.json.

    Raises:
      UserError: If there are no documents.
    """
    if self._num_pending:
      self._write_shard(np.concatenate(self._pending))
    if not self._num_documents:
      raise UserError(f"{self._folder}: the sources have no documents; use other sources")
    self._starts.write(np.int64(self._num_tokens).astype("<i8").tobytes())
    for file in self._indices:
      _close_durably(file)
    has_prefixes = (self._folder / "prefixes").stat().st_size > 0
    if not has_prefixes:
      (self._folder / "prefixes").unlink()
    manifest = {
      "dtype": self._dtype.str,
      "prefixes": has_prefixes,
      "documents": self._num_documents,
      "tokens": self._num_tokens,
      **self._request,
      **facts,
      "sha256": _content_hash(self._folder, self._state["shards"]),
      "shards": self._state["shards"],
    }
    self.manifest = manifest | {"checksum": content_checksum(manifest)}
    write_json(self._folder / MANIFEST, self.manifest)
    for path in (self._folder / PROGRESS, *self._folder.glob("carry-*")):
      path.unlink(missing_ok=True)
    return self.manifest

  def _finished(self) -> dict[str, Any] | None:
    if not (self._folder / MANIFEST).exists():
      return None
    manifest = read_manifest(self._folder)
    self._check_request({name: manifest.get(name) for name in self._request})
    return manifest

  def _resume(self) -> None:
    """Resumes after the last complete shard. Removes an incomplete shard."""
    for part in self._folder.glob(".tokens-*"):
      part.unlink()
    progress = self._folder / PROGRESS
    if progress.exists():
      content = json.loads(progress.read_text())
      self._check_request(content["request"])
      self._state = content["state"]
      self._pending = [np.fromfile(self._carry(), self._dtype)]
    elif strange := sorted(path.name for path in self._folder.iterdir() if not _is_ours(path.name)):
      raise UserError(f"{self._folder} is not empty (it contains {strange[0]}); choose another folder")

  def _check_request(self, there: dict[str, Any]) -> None:
    differs = [name for name, value in self._request.items() if there.get(name) != value]
    if differs:
      raise UserError(
        f"{self._folder} was started with a different {', '.join(differs)}; choose another folder, or delete this one"
      )

  def _carry(self) -> pathlib.Path:
    return self._folder / f"carry-{len(self._state['shards']):05}"

  def _write_shard(self, tokens: np.ndarray) -> None:
    name = f"tokens-{len(self._state['shards']):05}.array_record"
    with replacing(self._folder / name) as part:
      # One record per group and no compression: a window needs few records, and token ids hardly compress.
      writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
      for start in range(0, len(tokens), RECORD_TOKENS):
        writer.write(tokens[start : start + RECORD_TOKENS].tobytes())
      writer.close()
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    self._state["shards"].append({"file": name, "tokens": len(tokens), "sha256": digest})

  def _save_progress(self, carry: np.ndarray, position: Any) -> None:
    for file in self._indices:
      file.flush()
      os.fsync(file.fileno())
    old = list(self._folder.glob("carry-*"))
    self._state |= {
      "position": position,
      "documents": self._num_documents,
      "tokens": self._num_tokens,
    }
    write_whole(self._carry(), carry.tobytes())
    content = {"request": self._request, "state": self._state}
    write_json(self._folder / PROGRESS, content)
    for path in old:
      path.unlink(missing_ok=True)


def _open_index(path: pathlib.Path, documents: int) -> BinaryIO:
  """Opens an index file for appending, truncated to its first `documents`."""
  file = path.open("ab")
  file.truncate(min(8 * documents, file.tell()))
  return file


def _is_ours(name: str) -> bool:
  """Whether a killed process may have left this file before its first shard was complete."""
  return name in ("starts", "prefixes", "keys", LOCK) or name.startswith(("tokens-", "carry-", "."))


def _close_durably(file: Any) -> None:
  file.flush()
  os.fsync(file.fileno())
  file.close()
