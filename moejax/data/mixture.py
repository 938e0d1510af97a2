"""What training draws from: the windows of each stream of a corpus, and how much of each."""

import dataclasses
import pathlib

from moejax.config.data import Data
from moejax.data.best_fit import cached_plan
from moejax.data.corpus import Corpus
from moejax.data.packing import BestFit, Concatenated, Windows
from moejax.data.token_stream import TokenStream


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
  """Windows of one stream or several."""

  windows: tuple[Windows, ...]
  """Of each stream."""
  weights: tuple[float, ...] = ()
  """Share of each in a batch, in any unit; empty: drawn uniformly from all windows."""


def training_mixture(corpus: Corpus, data: Data) -> Mixture:
  """The training windows of a corpus, packed as `data` says; a plan that packing needs is made once and kept beside it.

  Raises:
    UserError: a stream is shorter than one window.
  """
  windows = (
    _windows(stream, data, corpus.folder / f"best_fit-{data.sequence_length}-{index}")
    for index, stream in enumerate(corpus.train)
  )
  return Mixture(tuple(windows), corpus.weights)


def _windows(stream: TokenStream, data: Data, folder: pathlib.Path) -> Windows:
  if data.packing == "concatenate":
    return Concatenated(stream, data.sequence_length)
  return BestFit(stream, data.sequence_length, cached_plan(folder, stream.starts, data.sequence_length))
