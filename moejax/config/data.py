"""Text sources, tokenizer and packing."""

import dataclasses
from typing import Literal, get_args

from moejax.config import checks
from moejax.config.resume import MAY_CHANGE
from moejax.errors import UserError

Packing = Literal["concatenate", "best_fit"]
OnError = Literal["stop", "skip"]

STANDARD_LIBRARY = "python-standard-library"
"""The built-in corpus: the Python source files of the standard library, which every Python installation has."""

BYTES, SEQIO, TFDS = "bytes", "seqio:", "tfds:"
"""The tokenizer that needs no file, and the prefixes of seqio tasks and of TensorFlow datasets."""

TOKENIZER_SUFFIXES = (".model", ".json", ".tiktoken")
"""Suffixes of SentencePiece, Hugging Face and tiktoken files."""


SMALLEST_SHARE = 1e-9
"""Smallest weight of a source, divided by the largest."""


def seqio_module(name: str) -> str:
  """MODULE of `seqio:MODULE/TASK@SPLIT`, or an empty string if it has none."""
  return name.removeprefix(SEQIO).partition("@")[0].rpartition("/")[0]


def unknown_tokenizer(name: str) -> str:
  """The error message for a name that is not a tokenizer. Names on the Hugging Face Hub are not looked up."""
  suffixes = ", ".join(TOKENIZER_SUFFIXES)
  return (
    f"data.tokenizer={name!r} is not one of {BYTES}, a {suffixes} file or {SEQIO}TASK; for a model on the Hugging Face "
    "Hub, give the path of its tokenizer.json or tokenizer.model (`hf download MODEL tokenizer.json` prints it)"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """Text sources and their packing into sequences."""

  train: tuple[str, ...] = (STANDARD_LIBRARY,)
  """Training text: files, folders, globs or URLs of .txt, .md, .rst, .py, .jsonl, .json, .csv, .tsv (each also .gz
  or .zst), .parquet or .arrow, the built-in corpus python-standard-library, tfds:NAME@SPLIT, seqio:MODULE/TASK@SPLIT,
  or a folder written by `moejax data pack`."""
  weights: tuple[float, ...] = ()
  """Relative weight of each source of train in the sequences of a batch. If empty, sources are mixed in proportion to
  their numbers of tokens. The rates of a seqio mixture apply to examples, as in seqio."""
  validation: tuple[str, ...] = ()
  """Held-out text, in the same formats as train. If empty, documents of train are held out by a hash of their text."""
  validation_fraction: float = 0.05
  """Fraction of the training documents that is held out if validation is empty."""
  deduplicate: bool = False
  """Whether to drop documents whose text equals that of an earlier document, and training documents that also occur in
  validation."""
  text_field: str = "text"
  """Field or column that holds the text, in formats with several. A dot selects a nested field, as in meta.text."""
  on_error: OnError = "stop"
  """How to handle records and files that are damaged, missing or not UTF-8. stop: raise an error that gives file and
  line. skip: skip the record, or the rest of the file, with a warning."""
  document_length: int | None = None
  """Maximum length of a document in characters. Longer texts are split into several documents at blank lines, line ends
  or spaces. None does not split texts."""
  tokenizer: str = BYTES
  """bytes (256 bytes, and the special tokens padding, begin and end of document), a file (SentencePiece .model, Hugging
  Face .json, tiktoken .tiktoken), or seqio:MODULE/TASK for the vocabulary of the task's targets."""
  packing: Packing = "concatenate"
  """concatenate: cut sequences from one stream of documents; a sequence may start within a document. best_fit: keep
  documents whole if they fit in a sequence, and pad the rest of each sequence."""
  sequence_length: int
  """Number of tokens in a training sequence (T)."""
  seed: int = 0
  """Seed for shuffling."""
  prefetch: int = dataclasses.field(default=8, metadata=MAY_CHANGE)
  """Number of batches to read ahead of the training step."""

  def __post_init__(self) -> None:
    checks.positive(self, "sequence_length", "prefetch")
    checks.one_of(self, "packing", get_args(Packing))
    checks.one_of(self, "on_error", get_args(OnError))
    checks.between(self, "validation_fraction", 0.0, 0.5)
    if self.document_length is not None:
      checks.positive(self, "document_length")
    if not self.train:
      raise UserError('data.train is empty; give a file, a folder, a glob or "python-standard-library"')
    if not self.validation and not self.validation_fraction:
      raise UserError(
        "data.validation is empty and data.validation_fraction=0, so no document is held out; set one of them"
      )
    self._check_weights()
    if self.tokenizer != BYTES and not self.tokenizer.startswith(SEQIO):
      self._check_tokenizer_file()

  def _check_tokenizer_file(self) -> None:
    if not self.tokenizer.endswith(TOKENIZER_SUFFIXES):
      raise UserError(unknown_tokenizer(self.tokenizer))

  def _check_weights(self) -> None:
    if not self.weights:
      return
    if len(self.weights) != len(self.train):
      raise UserError(
        f"data.weights has {len(self.weights)} numbers for the {len(self.train)} entries of data.train; "
        "give one number per entry, or none"
      )
    for weight in self.weights:
      if not 0 < weight < float("inf"):
        raise UserError(
          f"data.weights={weight} must be above 0 and finite; to leave a source out, remove it from data.train"
        )
    if min(self.weights) < SMALLEST_SHARE * max(self.weights):
      raise UserError(
        f"data.weights={min(self.weights)} is less than {SMALLEST_SHARE:g} of {max(self.weights)}, so that its source "
        "would not be read; remove it from data.train"
      )
