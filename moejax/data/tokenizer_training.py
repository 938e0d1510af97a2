"""Trains a byte-level BPE tokenizer, as `moejax tokenizer train` does."""

import pathlib
from collections.abc import Callable, Iterator, Sequence

from moejax.data.documents import Reading
from moejax.data.sources import source_parts
from moejax.errors import UserError
from moejax.files import replacing
from moejax.optional import library

SPECIALS = ("<|endoftext|>", "<|padding|>")
"""The specials of what is trained here: what opens and ends a document, and padding."""

_SMALLEST = 256 + len(SPECIALS)
_LARGEST = 2**22
"""Ten times the largest vocabulary in use. The library allocates memory for all ids at once."""

_PIECE = 2**20


def train_tokenizer(
  sources: Sequence[str],
  vocab_size: int,
  path: pathlib.Path,
  *,
  text_field: str = "text",
  progress: Callable[[str, float], None] = lambda what, done: None,
) -> int:
  """Writes a tokenizer.json with `vocab_size` ids, specials included, and returns how many there are.

  Text is split as GPT-2 splits it, then merged by BPE over bytes, so that any text can be encoded and none is lost. The
  result depends on the text alone.

  Args:
    sources: of text, as in data.train.
    vocab_size: ids; fewer result where the text is too small.
    path: ends in .json.
    text_field: as data.text_field.
    progress: called while text is read; merging follows, whose progress the library itself shows.

  Raises:
    UserError: a source is bad or all are empty, no vocabulary has that size, or the path has another suffix.
  """
  if path.suffix != ".json":
    raise UserError(f"{path} does not end in .json; choose a name that does")
  if vocab_size < _SMALLEST:
    raise UserError(f"a vocabulary of {vocab_size} is less than 256 bytes and {len(SPECIALS)} specials; use more")
  if vocab_size > _LARGEST:
    raise UserError(f"a vocabulary of {vocab_size:,} is more than {_LARGEST:,}; use less")
  tokenizers = library("tokenizers")
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIALS),
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
  )
  tokenizer.train_from_iterator(_texts(sources, text_field, progress), trainer)
  path.parent.mkdir(parents=True, exist_ok=True)
  with replacing(path) as part:
    tokenizer.save(str(part))
  return tokenizer.get_vocab_size()


def _texts(sources: Sequence[str], text_field: str, progress: Callable[[str, float], None]) -> Iterator[str]:
  """Yields documents in pieces of at most a million characters."""
  parts = [part for source in sources for part in source_parts(source)]
  total, before, empty = max(1, sum(part.size for part in parts)), 0, True
  for part in parts:
    for text, read in part.documents(Reading(text_field)):
      progress("reading text", min(1.0, (before + read) / total))
      for start in range(0, len(text or ""), _PIECE):
        yield (text or "")[start : start + _PIECE]
        empty = False
    before += part.size
  if empty:
    raise UserError(f"{', '.join(sources)}: no text is in there; name other sources")
