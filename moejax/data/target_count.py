"""Counts the targets of weight 1 in training batches, without reading tokens."""

import functools

import numpy as np

from moejax.config.data import Data
from moejax.config.experiment import Experiment
from moejax.config.parameters import budget_tokens
from moejax.data.corpus import Corpus
from moejax.data.mixture import Mixture, training_mixture
from moejax.data.pipeline import row_places
from moejax.errors import UserError

EXACT_ROWS = 2**17
"""Number of training rows that are counted exactly, which takes about 3 s. For later rows, the mean over all windows is
used, which is accurate to 0.1 percent for this number of rows."""

SAMPLE = 2**20
"""Maximum number of windows of a stream for the mean. They are evenly spaced."""


class TargetCounter:
  """Counts the targets of weight 1 in the training batches of experiments on a corpus, which depend on data.seed."""

  def __init__(self, corpus: Corpus):
    self._corpus = corpus
    self._rows: dict[tuple[int, str, int], _Rows] = {}

  def steps(self, experiment: Experiment) -> int:
    """Number of optimizer steps of a run: training.steps or, if it is None, the fewest steps that reach the budget.

    Raises:
      UserError: If the text has no tokens to predict.
    """
    training = experiment.training
    if training.steps is not None:
      return training.steps
    rows = self._rows_of(experiment.data).holding(budget_tokens(experiment.model, training.budget))
    return -(-rows // training.batch_size)

  def tokens(self, experiment: Experiment, steps: int) -> int:
    """Number of targets of weight 1 in the first `steps` batches."""
    return self._rows_of(experiment.data).targets(steps * experiment.training.batch_size)

  def _rows_of(self, data: Data) -> "_Rows":
    key = data.sequence_length, data.packing, data.seed
    if key not in self._rows:
      self._rows[key] = _Rows(training_mixture(self._corpus, data), data.seed)
    return self._rows[key]


class _Rows:
  """The training rows, in order."""

  def __init__(self, mixture: Mixture, seed: int):
    self._mixture = mixture
    self._place = row_places(mixture, seed)
    self._ends = np.zeros(1, np.int64)  # targets in the first n rows

  def targets(self, rows: int) -> int:
    """Number of targets in the first `rows` rows."""
    self._look_up(rows)
    beyond = rows - (len(self._ends) - 1)
    return int(self._ends[rows]) if beyond <= 0 else int(self._ends[-1] + beyond * self._mean)

  def holding(self, targets: int) -> int:
    """Smallest number of rows with at least `targets` targets."""
    while self._ends[-1] < targets and len(self._ends) <= EXACT_ROWS:
      self._look_up(2 * len(self._ends))
    if self._ends[-1] >= targets:
      return int(np.searchsorted(self._ends, targets))
    if not self._mean:
      raise UserError(
        "the training text has no token to predict: all tokens are prefixes without a loss; use other text"
      )
    return len(self._ends) - 1 + int(np.ceil((targets - self._ends[-1]) / self._mean))

  def _look_up(self, rows: int) -> None:
    known, rows = len(self._ends) - 1, min(rows, EXACT_ROWS)
    if rows <= known:
      return
    streams, indices = np.array([self._place(row) for row in range(known, rows)]).T
    targets = np.zeros(rows - known, np.int64)
    for stream, windows in enumerate(self._mixture.windows):
      if (here := streams == stream).any():
        targets[here] = windows.num_predicted(indices[here])
    self._ends = np.r_[self._ends, self._ends[-1] + np.cumsum(targets)]

  @functools.cached_property
  def _mean(self) -> float:
    """The mean number of targets of a row."""
    means, sizes = [], []
    for windows in self._mixture.windows:
      indices = np.unique(np.linspace(0, len(windows) - 1, min(len(windows), SAMPLE)).round().astype(np.int64))
      means.append(windows.num_predicted(indices).mean())
      sizes.append(len(windows))
    return float(np.average(means, weights=self._mixture.weights or sizes))
