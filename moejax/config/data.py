"""What text a model reads, and how it becomes tokens."""

import dataclasses
from typing import Literal, get_args

from moejax.config import checks
from moejax.errors import UserError

Tokenizer = Literal["bytes"]

STANDARD_LIBRARY = "python-standard-library"
"""The embedded corpus: the Python source files that every Python installation has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """Text sources and their packing into sequences."""

  train: tuple[str, ...] = (STANDARD_LIBRARY,)
  """Text to train on: files, folders or globs of .txt, .md, .rst, .py, .jsonl or .jsonl.gz (field "text"), or the
  embedded corpus python-standard-library."""
  validation: tuple[str, ...] = ()
  """Held-out text, as train; empty holds out documents of train by the hash of their name and text."""
  validation_fraction: float = 0.05
  """Part of the training documents that is held out where validation is empty."""
  tokenizer: Tokenizer = "bytes"
  """bytes: 256 bytes and the specials padding, begin and end of document."""
  sequence_length: int
  """Tokens in a training sequence (T)."""
  seed: int = 0
  """Seed of the shuffling."""
  prefetch: int = 8
  """Batches that are read ahead of the step."""

  def __post_init__(self):
    checks.positive(self, "sequence_length", "prefetch")
    checks.one_of(self, "tokenizer", get_args(Tokenizer))
    checks.between(self, "validation_fraction", 0.0, 0.5)
    if not self.train:
      raise UserError('data.train is empty; name a file, a folder, a glob or "python-standard-library"')
    if not self.validation and not self.validation_fraction:
      raise UserError("data.validation is empty and data.validation_fraction=0 holds nothing out; set one of them")
