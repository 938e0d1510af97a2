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
from moejax.data.documents import Part, document_key, is_held_out, nulls_warning, reading_of
from moejax.data.integrity import Verified, content_checksum, file_hash
from moejax.data.seqio_streams import materialise
from moejax.data.shards import check_packed, is_packed, mean_length, open_packed, read_keys, read_manifest
from moejax.data.sources import source_parts
from moejax.data.text import Text
from moejax.data.token_stream import StreamWriter, TokenStream, open_stream
from moejax.data.tokenizers import Tokenizer, encoded
from moejax.errors import UserError
from moejax.files import write_json

Progress = Callable[[str, float], None]
"""Called with a description of the work and the fraction that is done, 0 to 1."""

SPLITS = ("train", "validation")
PARTS = "parts.json"
"""In a corpus's folder: what each file, split or packed folder held."""
_FORMAT = 3  # goes up when what is written for the same sources changes


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """The text of an experiment, both splits."""

  train: tuple[TokenStream, ...]
  """Streams that are mixed; documents are in the order of the sources. Without weights all text is one stream."""
  weights: tuple[float, ...]
  """Weight of each training stream. If empty, streams are sampled in proportion to their tokens."""
  validation: TokenStream
  """Documents in the order of a hash of their text, so that any beginning of it is a fair sample of the whole; where it
  was packed, in that order."""
  tokenizer: Tokenizer
  """The tokenizer of the tokens."""
  folder: pathlib.Path
  """The folder of the tokenized streams."""

  def summary(self) -> dict[str, int | str | None]:
    """SPLIT_documents, SPLIT_tokens and SPLIT_bytes (UTF-8 bytes of text, None where a seqio task does not say) for
    train and validation; validation_in_train (validation documents whose tokens are those of a training document);
    train_duplicates (training documents that repeat an earlier one); nulls (texts that are null, and no documents);
    duplicates_dropped; tokenizer; sha256, which is equal exactly where all streams are."""
    return {name: value for name, value in _read_summary(self.folder).items() if name not in ("files", "checksum")}


def build_corpus(
  text: Text,
  cache: pathlib.Path,
  progress: Progress = lambda what, done: None,
  warn: Callable[[str], None] = lambda text: None,
) -> Corpus:
  """The corpus of a text, from `cache` where it holds one of the same files, tokenizer and split.

  Tokenizing streams from disk to disk, into a temporary folder that gets its name when all is written: a process that
  is killed leaves nothing that looks complete, and of two that tokenize at once one result stays.

  Args:
    text: sources, split and tokenizer; sequence length and seed make no difference here.
    cache: folder of all corpora, made where it is missing.
    progress: called at every per cent of the sources' bytes.
    warn: called with what is doubtful about the text, whether it was cached or not.

  Raises:
    UserError: a source is bad (one line with file, line and remedy), a split has no document, or what is packed was
      packed with another tokenizer.
  """
  data, tokenizer = text.data, text.tokenizer
  train, weights = _train_streams(text, cache)
  validation = _validation_stream(text, cache)
  streams = [*train, validation]
  folder = cache / _identity(data, streams, tokenizer)
  if not folder.is_dir() and not processes.is_first():
    raise UserError(
      f"process {processes.index()} finds other text than process 0, which has tokenized its own; give all hosts the "
      "same files, best on a file system that they share"
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
  for warning in _warnings(data, corpus.summary()):
    warn(warning)
  return corpus


def _read_summary(folder: pathlib.Path) -> dict[str, Any]:
  """The content of a corpus's summary.json.

  Raises:
    UserError: it is damaged.
  """
  path = folder / "summary.json"
  try:
    summary = json.loads(path.read_bytes())
    if content_checksum({name: summary[name] for name in summary if name != "checksum"}) == summary["checksum"]:
      return summary
  except (OSError, ValueError, TypeError, KeyError):
    pass
  raise UserError(f"{path} is damaged; delete {folder} and run again, which tokenizes the text again")


def _check_files(folder: pathlib.Path, verified: Verified) -> None:
  """Raises UserError where a stream of a corpus is not what was written."""
  for name, expected in _read_summary(folder)["files"].items():
    remedy = f"delete {folder} and run again, which tokenizes the text again"
    verified.check(folder / name, expected, file_hash, remedy)


def split_documents(data: Data) -> Iterator[tuple[str, str]]:
  """Every document of text with its split, in the order of the sources."""
  streams = [
    _Stream(split, tuple(part for source in getattr(data, split) for part in source_parts(source))) for split in SPLITS
  ]
  for name, text, _ in _split_documents(data, streams, lambda what, done: None, _Counters()):
    yield name, text


def _warnings(data: Data, summary: dict[str, Any]) -> Iterator[str]:
  if both := summary["validation_in_train"]:
    remedy = (
      "pack it again without them" if any(map(_is_tokens, data.train)) else "data.deduplicate drops them from train"
    )
    yield (
      f"{both:,} of {summary['validation_documents']:,} validation documents are training documents too, which makes "
      f"held-out scores too good; {remedy}"
    )
  if nulls := summary["nulls"]:
    yield nulls_warning(nulls, data.text_field)


@dataclasses.dataclass(frozen=True)
class _Stream:
  """What a stream is made of: parts that are tokenized, or a packed folder."""

  name: str
  """train, train-0, train-1, ... or validation."""
  parts: tuple[Part, ...] = ()
  packed: pathlib.Path | None = None


def _stream(name: str, text: Text, sources: Sequence[str]) -> _Stream:
  """A stream of sources of text."""
  return _Stream(name, tuple(part for source in sources for part in text.parts[source]))


def _train_streams(text: Text, cache: pathlib.Path) -> tuple[list[_Stream], tuple[float, ...]]:
  """The streams that training mixes, and their weights."""
  data = text.data
  if data.deduplicate and (tokens := [source for source in data.train + data.validation if _is_tokens(source)]):
    raise UserError(
      f"data.deduplicate=True compares texts, and {tokens[0]} is tokens; set it to False, and deduplicate what is "
      "packed with `moejax data pack --deduplicate`"
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
    raise UserError("data.train has a seqio mixture and other sources; set data.weights to one number for each")
  texts = [source for source in data.train if not _is_tokens(source)]
  if texts:
    streams.append(_stream("train", text, texts))
  return streams, tuple(weights) if mixture else ()


def _validation_stream(text: Text, cache: pathlib.Path) -> _Stream:
  data = text.data
  if not data.validation and all(map(_is_tokens, data.train)):
    raise UserError(
      "data.validation is empty and data.train has no text to hold out; set data.validation, packed with "
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
  """The packed folders of a source and their parts of it, which sum to 1; all text is refused."""
  if source.startswith(SEQIO):
    tasks = materialise(source, cache, text.tokenizer, text.data.sequence_length)
    # Rates are of examples, as in seqio, and weights are of sequences, which longer examples fill more of.
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
  """A hash of all that decides the streams, without reading the files."""
  facts: dict[str, object] = {"format": _FORMAT, "tokenizer": tokenizer.identity}
  *train, validation = streams
  facts["train"] = [(part.name, part.place, *part.version) for stream in train for part in stream.parts]
  facts["validation"] = [(part.name, part.place, *part.version) for part in validation.parts]
  if not data.validation:
    facts["validation_fraction"] = data.validation_fraction
  if STANDARD_LIBRARY in data.train + data.validation:
    facts["python"] = platform.python_version()
  for name in ("text_field", "document_length", "deduplicate"):
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
  """Writes the streams of text and parts.json into `folder` and returns the summary of all."""
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
  _check_splits(data, {name: writer.num_documents for name, writer in writers.items()})
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
  """How many documents are in both splits, and how often in train, by the keys of their tokens."""
  keys = keys | {stream.name: read_keys(stream.packed) for stream in streams if stream.packed}
  *train, validation = (keys[stream.name] for stream in streams)
  distinct = np.unique(np.concatenate(train))
  return {
    "validation_in_train": int(np.isin(validation, distinct).sum()),
    "train_duplicates": sum(map(len, train)) - len(distinct),
  }


def _unordered(name: str) -> str:
  """The stream that the documents of `name` are first written to."""
  return "unordered" if name == "validation" else name


def _summary(streams: list[_Stream], counts: dict[str, tuple[int, int, int]]) -> dict[str, int | str | None]:
  """Sums over the streams of each split; bytes are None where a seqio task did not say."""
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
  """What reading finds beside the documents that it gives."""

  nulls: int = 0
  duplicates_dropped: int = 0
  parts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  """Of each part: stream, name, place, documents, and a hash of their texts in order."""


def _split_documents(
  data: Data, streams: list[_Stream], progress: Progress, counters: _Counters
) -> Iterator[tuple[str, str, int]]:
  """Every document of text with the name of its stream and its key, in the order of the sources.

  Where training must not repeat what validation has, validation comes first.
  """
  total = sum(part.size for stream in streams for part in stream.parts)
  before, percent = 0, -1
  seen: set[int] = set()
  for stream in sorted(streams, key=lambda stream: data.deduplicate and stream.name != "validation"):
    for part in stream.parts:
      digest, count = hashlib.sha256(), 0
      for text, read in part.documents(reading_of(data)):
        counters.nulls += text is None
        if not text:
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


def _check_splits(data: Data, num_documents: dict[str, int]) -> None:
  empty = next((name for name in num_documents if not num_documents[name]), None)
  if empty is None:
    return
  split, _, index = empty.partition("-")
  if data.validation or not any(num_documents.values()) or index:
    sources = getattr(data, split)
    named = sources[int(index)] if index else ", ".join(sources)
    raise UserError(f"data.{split}={named} has no document with text; give other sources")
  raise UserError(
    f"data.validation_fraction={data.validation_fraction} leaves no document of {sum(num_documents.values())} for "
    f"{empty}; set data.validation, split long texts with data.document_length, or train on more documents"
  )


def _reorder(folder: pathlib.Path, order: np.ndarray, tokenizer: Tokenizer) -> None:
  """Writes the unordered stream's documents as the validation stream, in `order` [d]."""
  unordered = open_stream(folder, "unordered", tokenizer.vocab_size, tokenizer.padding)
  with StreamWriter(folder, "validation", tokenizer.vocab_size) as validation:
    for document in order:
      validation.add(unordered.tokens[unordered.starts[document] : unordered.starts[document + 1]])
  for path in folder.glob("unordered.*"):
    path.unlink()


def _file_hashes(folder: pathlib.Path, streams: list[_Stream]) -> dict[str, str]:
  """By name of the file, of the streams that are tokenized here."""
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
