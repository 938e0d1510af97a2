"""A corpus: the sources of an experiment as two token streams, tokenised once and kept on disk."""

import array
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator

import numpy as np

from moejax.config.data import STANDARD_LIBRARY, Data
from moejax.data.documents import Document, SourceFile, document_key, is_held_out, read_documents
from moejax.data.sources import check_sources, source_files
from moejax.data.token_stream import StreamWriter, TokenStream, open_stream
from moejax.data.tokenizers import Tokenizer, make_tokenizer
from moejax.errors import UserError

Progress = Callable[[str, float], None]
"""Called with what is being done and the part of it that is done, 0 to 1."""

SPLITS = ("train", "validation")
_FORMAT = 1  # goes up when what is written for the same sources changes
_ABANDONED_AFTER_S = 24 * 3600


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """Both splits of an experiment's text."""

  train: TokenStream
  """Documents in the order of the sources."""
  validation: TokenStream
  """Documents in the order of a hash of their name and text: any beginning of it is a fair sample of the whole."""
  tokenizer: Tokenizer
  """What made the tokens."""
  folder: pathlib.Path
  """Where the streams lie."""

  def summary(self) -> dict[str, int | str]:
    """SPLIT_documents, SPLIT_tokens and SPLIT_bytes (UTF-8 bytes of text) for train and validation; tokenizer; sha256,
    which is equal exactly where both streams are."""
    return json.loads((self.folder / "summary.json").read_text())


def build_corpus(data: Data, cache: pathlib.Path, progress: Progress | None = None) -> Corpus:
  """The corpus of `data`, from `cache` where it holds one of the same files, tokenizer and split.

  Tokenising streams from disk to disk, into a temporary folder that gets its name when all is written: a process that
  is killed leaves nothing that looks complete, and of two that tokenise at once one result stays.

  Args:
    data: sources, split and tokenizer; sequence length and seed make no difference here.
    cache: folder of all corpora, made where it is missing.
    progress: called at every per cent of the sources' bytes.

  Raises:
    UserError: a source is bad (one line with file, line and remedy), or a split has no document.
  """
  check_sources(data)
  tokenizer = make_tokenizer(data.tokenizer)
  files = {split: [file for source in getattr(data, split) for file in source_files(source)] for split in SPLITS}
  folder = cache / _identity(data, files, tokenizer)
  if not folder.is_dir():
    with _appearing(folder) as part:
      summary = _tokenise(data, files, tokenizer, part, progress or (lambda what, done: None))
      (part / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
  train, validation = (open_stream(folder, split, tokenizer.vocab_size, tokenizer.padding) for split in SPLITS)
  return Corpus(train, validation, tokenizer, folder)


def _identity(data: Data, files: dict[str, list[SourceFile]], tokenizer: Tokenizer) -> str:
  """A hash of all that decides the streams, without reading the files."""
  facts: dict[str, object] = {"format": _FORMAT, "tokenizer": tokenizer.identity}
  for split in SPLITS:
    facts[split] = [(file.name, str(file.path.resolve()), *_version(file.path)) for file in files[split]]
  if not data.validation:
    facts["validation_fraction"] = data.validation_fraction
  if STANDARD_LIBRARY in data.train + data.validation:
    facts["python"] = platform.python_version()
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def _version(path: pathlib.Path) -> tuple[int, int]:
  stat = path.stat()
  return stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def _appearing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
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


def _tokenise(
  data: Data, files: dict[str, list[SourceFile]], tokenizer: Tokenizer, folder: pathlib.Path, progress: Progress
) -> dict[str, int | str]:
  """Writes both streams into `folder` and returns their summary."""
  begin = np.array([tokenizer.begin])
  num_bytes = dict.fromkeys(SPLITS, 0)
  keys = array.array("Q")
  with (
    StreamWriter(folder, "train", tokenizer.vocab_size) as train,
    StreamWriter(folder, "unordered", tokenizer.vocab_size) as validation,
  ):
    writers = dict(zip(SPLITS, (train, validation), strict=True))
    for split, document in _split_documents(data, files, progress):
      writers[split].add(begin, tokenizer.encode(document.text))
      num_bytes[split] += len(document.text.encode())
      if split == "validation":
        keys.append(document_key(document))
  num_documents = {split: writer.num_documents for split, writer in writers.items()}
  _check_splits(data, num_documents)
  _reorder(folder, np.argsort(np.array(keys), kind="stable"), tokenizer)
  summary: dict[str, int | str] = {}
  for split, writer in writers.items():
    summary[f"{split}_documents"] = num_documents[split]
    summary[f"{split}_tokens"] = writer.num_tokens
    summary[f"{split}_bytes"] = num_bytes[split]
  return summary | {"tokenizer": tokenizer.identity, "sha256": _content_hash(folder)}


def _split_documents(
  data: Data, files: dict[str, list[SourceFile]], progress: Progress
) -> Iterator[tuple[str, Document]]:
  """Every document with its split, in the order of the sources."""
  total = sum(file.path.stat().st_size for split in SPLITS for file in files[split])
  before, percent = 0, -1
  for split in SPLITS:
    for file in files[split]:
      for document, read in read_documents(file):
        held_out = not data.validation and is_held_out(document, data.validation_fraction)
        yield "validation" if held_out else split, document
        if (now := 100 * (before + read) // total) > percent:
          percent = now
          progress("tokenising", min(percent / 100, 1.0))
      before += file.path.stat().st_size
  progress("tokenising", 1.0)


def _check_splits(data: Data, num_documents: dict[str, int]) -> None:
  empty = next((split for split in SPLITS if not num_documents[split]), None)
  if empty is None:
    return
  if data.validation or not any(num_documents.values()):
    raise UserError(f"data.{empty}={', '.join(getattr(data, empty))} holds no document with text; name other sources")
  raise UserError(
    f"data.validation_fraction={data.validation_fraction} leaves no document of {sum(num_documents.values())} for "
    f"{empty}; name data.validation, or train on more documents"
  )


def _reorder(folder: pathlib.Path, order: np.ndarray, tokenizer: Tokenizer) -> None:
  """Writes the unordered stream's documents as the validation stream, in `order` [d]."""
  unordered = open_stream(folder, "unordered", tokenizer.vocab_size, tokenizer.padding)
  with StreamWriter(folder, "validation", tokenizer.vocab_size) as validation:
    for document in order:
      validation.add(unordered.tokens[unordered.starts[document] : unordered.starts[document + 1]])
  for path in folder.glob("unordered.*"):
    path.unlink()


def _content_hash(folder: pathlib.Path) -> str:
  whole = hashlib.sha256()
  for split in SPLITS:
    for kind in ("tokens", "starts"):
      with (folder / f"{split}.{kind}").open("rb") as file:
        whole.update(hashlib.file_digest(file, "sha256").digest())
  return whole.hexdigest()
