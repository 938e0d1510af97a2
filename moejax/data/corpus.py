"""A corpus: the sources of an experiment as token streams, tokenized once and cached on disk."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from moejax import processes
from moejax.config.data import SEQIO, STANDARD_LIBRARY, Data
from moejax.data.appearing import appearing
from moejax.data.damage import Damaged, Skipped
from moejax.data.documents import Part, document_key, is_held_out, nulls_warning, reading_of
from moejax.data.integrity import Verified, content_checksum, file_hash
from moejax.data.seqio_streams import materialise
from moejax.data.shards import check_packed, is_packed, mean_length, open_packed, read_keys, read_manifest
from moejax.data.sources import source_parts
from moejax.data.text import Text
from moejax.data.token_stream import StreamWriter, TokenStream, open_stream
from moejax.data.tokenizers import Tokenizer, encoded
from moejax.errors import UserError
from moejax.files import read_json, write_json

Progress = Callable[[str, float], None]
"""Called with a description of the work and the fraction that is done, 0 to 1."""

SPLITS = ("train", "validation")
PARTS = "parts.json"
"""Name of the file in a corpus folder that describes each source file, split and packed folder."""
_FORMAT = 4  # must be increased if the content for the same sources changes


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """The tokenized text of an experiment, with training and validation splits."""

  train: tuple[TokenStream, ...]
  """The training streams, with documents in the order of the sources. Without weights, all text is one stream."""
  weights: tuple[float, ...]
  """Weight of each training stream. If empty, streams are sampled in proportion to their tokens."""
  validation: TokenStream
  """The validation stream, with documents in the order of a hash of their text, so that any initial part is a random
  sample. A packed folder keeps its own order."""
  tokenizer: Tokenizer
  """The tokenizer of the tokens."""
  folder: pathlib.Path
  """The folder of the tokenized streams."""

  def summary(self) -> dict[str, int | str | None]:
    """SPLIT_documents, SPLIT_tokens and SPLIT_bytes (UTF-8 bytes of text, or None if unknown, as for some seqio tasks)
    for train and validation; validation_in_train (validation documents with the tokens of a training document);
    train_duplicates (training documents that repeat an earlier one); nulls (null texts, which are skipped); skipped
    (unreadable records and files); duplicates_dropped; tokenizer; sha256 (a hash of all streams)."""
    summary, internal = _read_summary(self.folder), ("files", "checksum", "skipped_first")
    return {name: value for name, value in summary.items() if name not in internal}


def build_corpus(
  text: Text,
  cache: pathlib.Path,
  progress: Progress = lambda what, done: None,
  warn: Callable[[str], None] = lambda text: None,
) -> Corpus:
  """Tokenizes a text, or uses the corpus in `cache` if it has one with the same files, tokenizer and split.

  The text is streamed from disk to disk. The corpus is written to a temporary folder, which is renamed when it is
  complete, so that a killed process leaves no incomplete corpus. If two processes tokenize the same text, one result is
  kept.

  Args:
    text: sources, split and tokenizer. Sequence length and seed have no effect.
    cache: folder of all corpora, which is created if necessary.
    progress: called at every percent of the bytes of the sources.
    warn: called with each warning about the text, even if it was cached.

  Raises:
    UserError: If a source is not valid (the message gives file, line and remedy), a split has no documents, or a packed
      folder was packed with another tokenizer.
  """
  data, tokenizer = text.data, text.tokenizer
  train, weights = _train_streams(text, cache)
  validation = _validation_stream(text, cache)
  streams = [*train, validation]
  folder = cache / _identity(data, streams, tokenizer)
  if not folder.is_dir() and not processes.is_first():
    raise UserError(
      f"process {processes.index()} finds other text than process 0, which has tokenized it; give all hosts the same "
      "files, preferably on a shared file system"
    )
  if not folder.is_dir():
    with appearing(folder) as part:
      summary = _tokenize(data, streams, tokenizer, part, progress)
      write_json(part / "summary.json", summary | {"checksum": content_checksum(summary)})
  verified = Verified(cache)
  _check_files(folder, verified)
  for stream in streams:
    if stream.packed:
      check_packed(stream.packed, tokenizer.vocab_size, verified)
  *opened, validated = (_open(stream, folder, tokenizer) for stream in streams)
  corpus = Corpus(tuple(opened), weights, validated, tokenizer, folder)
  for warning in _warnings(data, _read_summary(folder)):
    warn(warning)
  return corpus


def _read_summary(folder: pathlib.Path) -> dict[str, Any]:
  """Reads the summary.json of a corpus.

  Raises:
    UserError: If it is damaged.
  """
  path = folder / "summary.json"
  try:
    summary = read_json(path)
    if content_checksum({name: summary[name] for name in summary if name != "checksum"}) == summary["checksum"]:
      return summary
  except (OSError, ValueError, TypeError, KeyError):
    pass
  raise UserError(f"{path} is damaged; delete {folder} and run again to tokenize the text again")


def _check_files(folder: pathlib.Path, verified: Verified) -> None:
  """Raises UserError if a stream of a corpus has changed since it was written."""
  for name, expected in _read_summary(folder)["files"].items():
    remedy = f"delete {folder} and run again to tokenize the text again"
    verified.check(folder / name, expected, file_hash, remedy)


def split_documents(data: Data) -> Iterator[tuple[str, str]]:
  """Yields every document with its split, in the order of the sources."""
  streams = [
    _Stream(split, tuple(part for source in getattr(data, split) for part in source_parts(source))) for split in SPLITS
  ]
  for name, text, _ in _split_documents(data, streams, lambda what, done: None, _Counters()):
    yield name, text


def _warnings(data: Data, summary: dict[str, Any]) -> Iterator[str]:
  if both := summary["validation_in_train"]:
    remedy = "pack it again without them" if any(map(_is_tokens, data.train)) else "set data.deduplicate to remove them"
    yield (
      f"{both:,} of {summary['validation_documents']:,} validation documents are also in the training text, which "
      "makes "
      f"held-out scores too good; {remedy}"
    )
  if nulls := summary["nulls"]:
    yield nulls_warning(nulls, data.text_field)
  if summary["skipped"]:
    yield Skipped(summary["skipped"], summary["skipped_first"]).warning()


@dataclasses.dataclass(frozen=True)
class _Stream:
  """The content of a stream: parts to tokenize, or a packed folder."""

  name: str
  """train, train-0, train-1, ... or validation."""
  parts: tuple[Part, ...] = ()
  packed: pathlib.Path | None = None


def _stream(name: str, text: Text, sources: Sequence[str]) -> _Stream:
  """Makes the stream of some text sources."""
  return _Stream(name, tuple(part for source in sources for part in text.parts[source]))


def _train_streams(text: Text, cache: pathlib.Path) -> tuple[list[_Stream], tuple[float, ...]]:
  """The training streams and their weights."""
  data = text.data
  if data.deduplicate and (tokens := [source for source in data.train + data.validation if _is_tokens(source)]):
    raise UserError(
      f"data.deduplicate=True compares texts, but {tokens[0]} contains tokens; set it to False, and use "
      "`moejax data pack --deduplicate` to deduplicate packed text"
    )
  if not data.weights and not any(map(_is_tokens, data.train)):
    return [_stream("train", text, data.train)], ()
  streams: list[_Stream] = []
  weights: list[float] = []
  mixture = False
  for index, source in enumerate(data.train):
    name, weight = f"train-{index}", data.weights[index] if data.weights else 1.0
    if not _is_tokens(source):
      if data.weights:
        streams.append(_stream(name, text, [source]))
        weights.append(weight)
      continue
    folders = _packed_folders(source, text, cache)
    mixture |= len(folders) > 1
    streams += [_Stream(name, packed=folder) for folder, _ in folders]
    weights += [weight * rate for _, rate in folders]
  if data.weights:
    return streams, tuple(weights)
  if mixture and len(data.train) > 1:
    raise UserError("data.train has a seqio mixture and other sources; set data.weights to one number per source")
  texts = [source for source in data.train if not _is_tokens(source)]
  if texts:
    streams.append(_stream("train", text, texts))
  return streams, tuple(weights) if mixture else ()


def _validation_stream(text: Text, cache: pathlib.Path) -> _Stream:
  data = text.data
  if not data.validation and all(map(_is_tokens, data.train)):
    raise UserError(
      "data.validation is empty but data.train has no text to hold out; set data.validation to a folder packed with "
      "`moejax data pack --keep validation`"
    )
  if not any(map(_is_tokens, data.validation)):
    return _stream("validation", text, data.validation)
  folders = [folder for source in data.validation for folder in _packed_folders(source, text, cache)]
  if len(data.validation) > 1 or len(folders) > 1:
    raise UserError(
      f"data.validation={', '.join(data.validation)} is more than one packed source; pack all of it into one folder"
    )
  return _Stream("validation", packed=folders[0][0])


def _is_tokens(source: str) -> bool:
  return source.startswith(SEQIO) or is_packed(source)


def _packed_folders(source: str, text: Text, cache: pathlib.Path) -> list[tuple[pathlib.Path, float]]:
  """The packed folders of a source and their weights in it, which sum to 1. Raises UserError for text."""
  if source.startswith(SEQIO):
    tasks = materialise(source, cache, text.tokenizer, text.data.sequence_length)
    # Rates in seqio apply to examples, but weights apply to sequences, of which longer examples fill more.
    shares = [task.rate * mean_length(task.folder) for task in tasks]
    return [(task.folder, share / sum(shares)) for task, share in zip(tasks, shares, strict=True)]
  if is_packed(source):
    return [(pathlib.Path(source).expanduser(), 1.0)]
  raise UserError(f"data.validation mixes text ({source!r}) and packed tokens; use one of them")


def _open(stream: _Stream, folder: pathlib.Path, tokenizer: Tokenizer) -> TokenStream:
  if stream.packed:
    return open_packed(stream.packed, tokenizer.identity, tokenizer.padding)
  return open_stream(folder, stream.name, tokenizer.vocab_size, tokenizer.padding)


def _identity(data: Data, streams: list[_Stream], tokenizer: Tokenizer) -> str:
  """A hash of everything that determines the streams, computed without reading the files."""
  facts: dict[str, object] = {"format": _FORMAT, "tokenizer": tokenizer.identity}
  *train, validation = streams
  facts["train"] = [(part.name, part.place, *part.version) for stream in train for part in stream.parts]
  facts["validation"] = [(part.name, part.place, *part.version) for part in validation.parts]
  if not data.validation:
    facts["validation_fraction"] = data.validation_fraction
  if STANDARD_LIBRARY in data.train + data.validation:
    facts["python"] = platform.python_version()
  for name in ("text_field", "document_length", "deduplicate", "on_error"):
    facts[name] = getattr(data, name)
  if len(train) > 1 or train[0].packed or validation.packed:
    facts["streams"] = [
      read_manifest(stream.packed)["sha256"] if stream.packed else (stream.name, len(stream.parts))
      for stream in streams
    ]
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def _tokenize(
  data: Data, streams: list[_Stream], tokenizer: Tokenizer, folder: pathlib.Path, progress: Progress
) -> dict[str, Any]:
  """Writes the streams of text and parts.json to `folder` and returns the summary of all streams."""
  begin = np.array([tokenizer.begin])
  texts = [stream for stream in streams if not stream.packed]
  num_bytes = {stream.name: 0 for stream in texts}
  order: list[int] = []
  counters = _Counters()
  with contextlib.ExitStack() as stack:
    writers = {
      stream.name: stack.enter_context(StreamWriter(folder, _unordered(stream.name), tokenizer.vocab_size))
      for stream in texts
    }
    for name, text, key in _split_documents(data, texts, progress, counters):
      writers[name].add(begin, *encoded(tokenizer, text))
      num_bytes[name] += len(text.encode())
      if name == "validation":
        order.append(key)
  _check_splits(data, {name: writer.num_documents for name, writer in writers.items()}, counters.skipped)
  if "validation" in writers:
    _reorder(folder, np.argsort(np.array(order, np.uint64), kind="stable"), tokenizer)
  write_json(folder / PARTS, counters.parts + _packed_parts(streams))
  files = _file_hashes(folder, streams)
  counts = {name: (writer.num_documents, writer.num_tokens, num_bytes[name]) for name, writer in writers.items()}
  return {
    **_summary(streams, counts),
    **_repeated(streams, {name: np.array(writer.keys, np.uint64) for name, writer in writers.items()}),
    "duplicates_dropped": counters.duplicates_dropped,
    "nulls": counters.nulls,
    "skipped": counters.skipped.count,
    "skipped_first": counters.skipped.first,
    "tokenizer": tokenizer.identity,
    "sha256": _content_hash(files, streams),
    "files": files,
  }


def _packed_parts(streams: list[_Stream]) -> list[dict[str, Any]]:
  packed = {stream.name: stream.packed for stream in streams if stream.packed}
  return [
    {"stream": name, "name": folder.name, "place": str(folder), "sha256": read_manifest(folder)["sha256"]}
    for name, folder in packed.items()
  ]


def _repeated(streams: list[_Stream], keys: dict[str, np.ndarray]) -> dict[str, int]:
  """Numbers of validation documents that are in train and of repeated training documents, by the keys of tokens."""
  keys = keys | {stream.name: read_keys(stream.packed) for stream in streams if stream.packed}
  *train, validation = (keys[stream.name] for stream in streams)
  distinct = np.unique(np.concatenate(train))
  return {
    "validation_in_train": int(np.isin(validation, distinct).sum()),
    "train_duplicates": sum(map(len, train)) - len(distinct),
  }


def _unordered(name: str) -> str:
  """Name of the stream to which the documents of `name` are written first."""
  return "unordered" if name == "validation" else name


def _summary(streams: list[_Stream], counts: dict[str, tuple[int, int, int]]) -> dict[str, int | str | None]:
  """Sums over the streams of each split. Bytes are None if they are unknown, as for some seqio tasks."""
  summary: dict[str, int | str | None] = {}
  for split in SPLITS:
    rows = []
    for stream in streams:
      if stream.name.partition("-")[0] == split:
        manifest = read_manifest(stream.packed) if stream.packed else {}
        packed = tuple(manifest.get(name) for name in ("documents", "tokens", "text_bytes"))
        rows.append(packed if stream.packed else counts[stream.name])
    for name, column in zip(("documents", "tokens", "bytes"), zip(*rows, strict=True), strict=True):
      summary[f"{split}_{name}"] = None if None in column else sum(column)
  return summary


@dataclasses.dataclass
class _Counters:
  """Statistics that are collected while documents are read."""

  nulls: int = 0
  duplicates_dropped: int = 0
  skipped: Skipped = dataclasses.field(default_factory=Skipped)
  parts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  """For each part: stream, name, place, number of documents, and a hash of their texts in order."""


def _split_documents(
  data: Data, streams: list[_Stream], progress: Progress, counters: _Counters
) -> Iterator[tuple[str, str, int]]:
  """Yields every document with the name of its stream and its key, in the order of the sources.

  Validation comes first if training documents that are in validation must be dropped.
  """
  total = max(1, sum(part.size for stream in streams for part in stream.parts))
  before, percent = 0, -1
  seen: set[int] = set()
  for stream in sorted(streams, key=lambda stream: data.deduplicate and stream.name != "validation"):
    for part in stream.parts:
      digest, count = hashlib.sha256(), 0
      for text, read in part.documents(reading_of(data)):
        counters.nulls += text is None
        if isinstance(text, Damaged):
          counters.skipped.add(text)
        if not isinstance(text, str) or not text:
          continue
        key = document_key(text)
        count += 1
        digest.update(key.to_bytes(8, "big"))
        if data.deduplicate and key in seen:
          counters.duplicates_dropped += 1
          continue
        if data.deduplicate:
          seen.add(key)
        held_out = not data.validation and is_held_out(key, data.validation_fraction)
        yield "validation" if held_out else stream.name, text, key
        if (now := 100 * (before + read) // total) > percent:
          percent = now
          progress("tokenizing", min(percent / 100, 1.0))
      counters.parts.append(
        {
          "stream": stream.name,
          "name": part.name,
          "place": part.place,
          "documents": count,
          "sha256": digest.hexdigest(),
        }
      )
      before += part.size
  progress("tokenizing", 1.0)


def _check_splits(data: Data, num_documents: dict[str, int], skipped: Skipped) -> None:
  empty = next((name for name in num_documents if not num_documents[name]), None)
  if empty is None:
    return
  split, _, index = empty.partition("-")
  if data.validation or not any(num_documents.values()) or index:
    sources = getattr(data, split)
    named = sources[int(index)] if index else ", ".join(sources)
    why = f" ({skipped.warning()})" if skipped.count else ""
    raise UserError(f"data.{split}={named} has no document with text{why}; use other sources")
  raise UserError(
    f"data.validation_fraction={data.validation_fraction} leaves no document of {sum(num_documents.values())} for "
    f"{empty}; set data.validation, split long texts with data.document_length, or train on more documents"
  )


def _reorder(folder: pathlib.Path, order: np.ndarray, tokenizer: Tokenizer) -> None:
  """Writes the documents of the unordered stream to the validation stream, in `order` [d]."""
  unordered = open_stream(folder, "unordered", tokenizer.vocab_size, tokenizer.padding)
  with StreamWriter(folder, "validation", tokenizer.vocab_size) as validation:
    for document in order:
      validation.add(unordered.tokens[unordered.starts[document] : unordered.starts[document + 1]])
  for path in folder.glob("unordered.*"):
    path.unlink()


def _file_hashes(folder: pathlib.Path, streams: list[_Stream]) -> dict[str, str]:
  """Hashes of the files of tokenized streams, by file name."""
  names = [f"{stream.name}.{kind}" for stream in streams if not stream.packed for kind in ("tokens", "starts")]
  return {name: file_hash(folder / name) for name in names}


def _content_hash(files: dict[str, str], streams: list[_Stream]) -> str:
  whole = hashlib.sha256()
  for stream in streams:
    of_text = [f"{stream.name}.{kind}" for kind in ("tokens", "starts")]
    digests = [read_manifest(stream.packed)["sha256"]] if stream.packed else [files[name] for name in of_text]
    for digest in digests:
      whole.update(bytes.fromhex(digest))
  return whole.hexdigest()
