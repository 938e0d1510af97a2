"""The training examples: windows of each stream of a corpus, and their weights."""

import dataclasses
import pathlib

from moejax.config.data import Data
from moejax.data.best_fit import cached_plan
from moejax.data.corpus import Corpus
from moejax.data.packing import BestFit, Concatenated, Windows
from moejax.data.token_stream import TokenStream


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
  """The windows of one or more streams, with weights."""

  windows: tuple[Windows, ...]
  """The windows of each stream."""
  weights: tuple[float, ...] = ()
  """Relative weight of each stream. If empty, windows are drawn uniformly from all streams."""


def training_mixture(corpus: Corpus, data: Data) -> Mixture:
  """The training windows of a corpus with the packing of `data`. Packing plans are cached in the folder of the corpus.

  Raises:
    UserError: If a stream is shorter than one window.
  """
  windows = (
    _windows(stream, data, corpus.folder / f"packing-{data.sequence_length}-{index}")
    for index, stream in enumerate(corpus.train)
  )
  return Mixture(tuple(windows), corpus.weights)


def _windows(stream: TokenStream, data: Data, folder: pathlib.Path) -> Windows:
  if data.packing == "concatenate":
    return Concatenated(stream, data.sequence_length)
  return BestFit(stream, data.sequence_length, cached_plan(folder, stream.starts, data.sequence_length))
