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
"""The tokenizer that needs no file, and how names of seqio tasks and TensorFlow datasets begin."""

TOKENIZER_SUFFIXES = (".model", ".json", ".tiktoken")
"""Files of SentencePiece, of Hugging Face tokenizers, and ranks of tiktoken."""


def unknown_tokenizer(name: str) -> str:
  """What to say of a name that is no tokenizer's: models are not looked up on a hub, their files are read."""
  suffixes = ", ".join(TOKENIZER_SUFFIXES)
  return (
    f"data.tokenizer={name!r} is not one of {BYTES}, a {suffixes} file or {SEQIO}TASK; of a model on the Hugging Face "
    "Hub, name its tokenizer.json or tokenizer.model (`hf download MODEL tokenizer.json` prints where it lies)"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """Text sources and their packing into sequences."""

  train: tuple[str, ...] = (STANDARD_LIBRARY,)
  """Text to train on: files, folders, globs or URLs of .txt, .md, .rst, .py, .jsonl, .json, .csv, .tsv (each also .gz
  or .zst), .parquet or .arrow, the embedded corpus python-standard-library, tfds:NAME@SPLIT, seqio:MODULE/TASK@SPLIT,
  or a folder that `moejax data pack` wrote."""
  weights: tuple[float, ...] = ()
  """Share of each entry of train in the sequences of a batch, in any unit; empty takes all in proportion to their
  tokens. Within a seqio mixture the rates of its tasks count examples, as in seqio."""
  validation: tuple[str, ...] = ()
  """Held-out text, as train; empty holds out documents of train by the hash of their text."""
  validation_fraction: float = 0.05
  """Part of the training documents that is held out where validation is empty."""
  deduplicate: bool = False
  """Drop a document whose text is exactly that of an earlier one, and training documents that are in validation."""
  text_field: str = "text"
  """Field or column that holds the text, where documents have several; a.b is the field b of a."""
  document_length: int | None = None
  """Longest document in characters. Longer texts are cut into several documents at blank lines, line ends or spaces;
  None leaves every text whole."""
  tokenizer: str = BYTES
  """bytes (256 and the specials padding, begin and end of document), a file (SentencePiece .model, Hugging Face .json,
  tiktoken ranks .tiktoken), or seqio:MODULE/TASK for the vocabulary of its targets."""
  packing: Packing = "concatenate"
  """concatenate: sequences are cut from one stream and may begin within a document; best_fit: documents no longer than
  a sequence stay whole, and what is left of a sequence is padding."""
  sequence_length: int
  """Tokens in a training sequence (T)."""
  seed: int = 0
  """Seed of the shuffling."""
  prefetch: int = dataclasses.field(default=8, metadata=MAY_CHANGE)
  """Batches that are read ahead of the step."""

  def __post_init__(self):
    checks.positive(self, "sequence_length", "prefetch")
    checks.one_of(self, "packing", get_args(Packing))
    checks.between(self, "validation_fraction", 0.0, 0.5)
    if self.document_length is not None:
      checks.positive(self, "document_length")
    if not self.train:
      raise UserError('data.train is empty; name a file, a folder, a glob or "python-standard-library"')
    if not self.validation and not self.validation_fraction:
      raise UserError("data.validation is empty and data.validation_fraction=0 holds nothing out; set one of them")
    self._check_weights()
    if self.tokenizer != BYTES and not self.tokenizer.startswith(SEQIO):
      self._check_tokenizer_file()

  def _check_tokenizer_file(self):
    if not self.tokenizer.endswith(TOKENIZER_SUFFIXES):
      raise UserError(unknown_tokenizer(self.tokenizer))

  def _check_weights(self):
    if not self.weights:
      return
    if len(self.weights) != len(self.train):
      raise UserError(
        f"data.weights has {len(self.weights)} numbers for the {len(self.train)} entries of data.train; "
        "give one for each, or none"
      )
    for weight in self.weights:
      if not 0 < weight < float("inf"):
        raise UserError(f"data.weights={weight} must be above 0 and finite; leave the source out of data.train instead")
