"""Implements `moejax tokenizer train`: trains a byte-level BPE tokenizer."""

import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

from moejax.config.data import OnError
from moejax.data.damage import Damaged, Skipped
from moejax.data.documents import Reading
from moejax.data.sources import source_parts
from moejax.errors import UserError
from moejax.files import replacing
from moejax.optional import library

SPECIALS = ("<|endoftext|>", "<|padding|>")
"""The special tokens of trained tokenizers: begin and end of a document, and padding."""

_SMALLEST = 256 + len(SPECIALS)
_LARGEST = 2**22
"""Maximum vocabulary size, ten times the largest in use. The library allocates memory for all ids at once."""

_PIECE = 2**20


def train_tokenizer(
  sources: Sequence[str],
  vocab_size: int,
  path: pathlib.Path,
  *,
  text_field: str = "text",
  on_error: OnError = "stop",
  progress: Callable[[str, float], None] = lambda what, done: None,
  warn: Callable[[str], None] = lambda text: None,
) -> int:
  """Writes a tokenizer.json with at most `vocab_size` tokens, including special tokens, and returns their number.

  Text is split as in GPT-2 and merged by BPE over bytes, so that any text can be encoded without loss. The result
  depends only on the text.

  Args:
    sources: text sources, as in data.train.
    vocab_size: number of tokens. There are fewer if the text is too short.
    path: path of the output file, which must end in .json.
    text_field: as in data.text_field.
    on_error: as in data.on_error.
    progress: called while text is read. In a terminal, the library shows the progress of the merges.
    warn: called with a warning if records were skipped.

  Raises:
    UserError: If a source is not valid, all sources are empty, the vocabulary size is out of range, or the path has
      another suffix.
  """
  if path.suffix != ".json":
    raise UserError(f"{path} does not end in .json; choose a name that ends in .json")
  if vocab_size < _SMALLEST:
    raise UserError(
      f"vocab_size={vocab_size} must be at least 256 bytes + {len(SPECIALS)} special tokens = {_SMALLEST}"
    )
  if vocab_size > _LARGEST:
    raise UserError(f"vocab_size={vocab_size:,} must be at most {_LARGEST:,}")
  tokenizers = library("tokenizers")
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIALS),
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=sys.stderr.isatty(),  # it would write empty lines to a log
  )
  skipped = Skipped()
  tokenizer.train_from_iterator(_texts(sources, Reading(text_field, on_error=on_error), progress, skipped), trainer)
  if skipped.count:
    warn(skipped.warning())
  path.parent.mkdir(parents=True, exist_ok=True)
  with replacing(path) as part:
    tokenizer.save(str(part))
  return tokenizer.get_vocab_size()


def _texts(
  sources: Sequence[str], reading: Reading, progress: Callable[[str, float], None], skipped: Skipped
) -> Iterator[str]:
  """Yields documents in pieces of at most a million characters."""
  parts = [part for source in sources for part in source_parts(source)]
  total, before, empty = max(1, sum(part.size for part in parts)), 0, True
  for part in parts:
    for text, read in part.documents(reading):
      progress("reading text", min(1.0, (before + read) / total))
      if isinstance(text, Damaged):
        skipped.add(text)
        continue
      for start in range(0, len(text or ""), _PIECE):
        yield (text or "")[start : start + _PIECE]
        empty = False
    before += part.size
  if empty:
    raise UserError(f"{', '.join(sources)}: the sources contain no text; use other sources")
