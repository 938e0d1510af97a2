"""The sources and the tokenizer of an experiment, opened and checked but not read. A corpus is built from it."""

import dataclasses
import pathlib
from collections.abc import Mapping

from moejax.config.data import Data
from moejax.data.documents import Part
from moejax.data.sources import check_outside, check_sources
from moejax.data.tokenizers import Tokenizer, make_tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
  """The sources and the tokenizer of `data`."""

  data: Data
  tokenizer: Tokenizer
  parts: Mapping[str, tuple[Part, ...]]
  """The files or splits of each text source. Sources of tokens have none."""


def open_text(data: Data, directory: pathlib.Path | None = None) -> Text:
  """Opens the tokenizer and finds the sources of an experiment. Does not need JAX.

  Raises:
    UserError: If the tokenizer or a source is missing, empty or of unknown kind, or `directory`, to which the run
      writes, is inside a source.
  """
  if directory is not None:
    check_outside(data.train + data.validation, directory, "--workdir")
  return Text(data, make_tokenizer(data.tokenizer), check_sources(data))
