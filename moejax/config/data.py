"""What text a model reads, and how it becomes tokens."""

import dataclasses
from typing import Literal, get_args

from moejax.config import checks
from moejax.config.resume import MAY_CHANGE
from moejax.errors import UserError

Packing = Literal["concatenate", "best_fit"]

STANDARD_LIBRARY = "python-standard-library"
"""The embedded corpus: the Python source files that every Python installation has."""

BYTES, SEQIO, TFDS = "bytes", "seqio:", "tfds:"
"""The tokenizer without a file, and the prefixes of seqio tasks and of TensorFlow datasets."""

TOKENIZER_SUFFIXES = (".model", ".json", ".tiktoken")
"""Suffixes of SentencePiece, Hugging Face and tiktoken files."""


def seqio_module(name: str) -> str:
  """MODULE of `seqio:MODULE/TASK@SPLIT`, empty if none is named."""
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
  or .zst), .parquet or .arrow, the embedded corpus python-standard-library, tfds:NAME@SPLIT, seqio:MODULE/TASK@SPLIT,
  or a folder written by `moejax data pack`."""
  weights: tuple[float, ...] = ()
  """Share of each source of train in the sequences of a batch, in any unit. If empty, sources are mixed in proportion
  to their tokens. The rates of a seqio mixture count examples, as in seqio."""
  validation: tuple[str, ...] = ()
  """Held-out text, given like train. If empty, documents of train are held out by a hash of their text."""
  validation_fraction: float = 0.05
  """Fraction of the training documents that is held out if validation is empty."""
  deduplicate: bool = False
  """Whether to drop documents with exactly the text of an earlier one, and training documents that are in
  validation."""
  text_field: str = "text"
  """Field or column with the text, for formats with several; a.b is the field b of a."""
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
  """Tokens in a training sequence (T)."""
  seed: int = 0
  """Seed for shuffling."""
  prefetch: int = dataclasses.field(default=8, metadata=MAY_CHANGE)
  """Number of batches to read ahead of the training step."""

  def __post_init__(self) -> None:
    checks.positive(self, "sequence_length", "prefetch")
    checks.one_of(self, "packing", get_args(Packing))
    checks.between(self, "validation_fraction", 0.0, 0.5)
    if self.document_length is not None:
      checks.positive(self, "document_length")
    if not self.train:
      raise UserError('data.train is empty; give a file, a folder, a glob or "python-standard-library"')
    if not self.validation and not self.validation_fraction:
      raise UserError("data.validation is empty and data.validation_fraction=0 holds nothing out; set one of them")
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
        "give one number for each, or none"
      )
    for weight in self.weights:
      if not 0 < weight < float("inf"):
        raise UserError(f"data.weights={weight} must be above 0 and finite; leave the source out of data.train instead")
