"""Counts skipped steps on the host and decides whether the run continues."""

import collections

from moejax.config.training import Anomalies
from moejax.training.metrics import Record
from moejax.training.not_finite import ESSENTIAL, not_finite

SKIPPED = "skipped"
"""Metric of a step: 1 if its update was skipped, else 0."""

MAX_REWINDS = 3
"""Maximum number of times that a run is rewound to the same checkpoint."""


class Skips:
  """Counts skipped steps."""

  def __init__(self, anomalies: Anomalies, steps: int, total: int):
    """`steps` is the length of the run, and `total` the number of steps that were skipped before it was resumed."""
    self.total, self.streak = total, 0
    self.exceeded = False
    """Whether too many consecutive steps were skipped, or the parameters are not finite."""
    self.first: Record = {}
    """The record of the first of consecutive skipped steps."""
    self._anomalies = anomalies
    self._most = min(anomalies.max_skipped, steps - 1)  # a run must apply at least one update
    self._rewinds: collections.Counter[int] = collections.Counter()

  def count(self, record: Record) -> bool:
    """Whether the step of this record was skipped."""
    skipped = bool(record[SKIPPED])
    self.total += skipped
    self.streak = self.streak + 1 if skipped else 0
    broken = not skipped and bool(not_finite(record))
    if self.streak == 1 or broken:
      self.first = record
    self.exceeded = self.streak > self._most or broken
    return skipped

  def may_rewind(self, checkpoint: int) -> bool:
    """Whether the run is rewound to the checkpoint of this step instead of stopping."""
    return self._anomalies.then == "rewind" and self._rewinds[checkpoint] < MAX_REWINDS

  def rewind(self, checkpoint: int) -> None:
    """Records that the run was rewound."""
    self._rewinds[checkpoint] += 1
    self.streak, self.exceeded = 0, False

  def describe(self, record: Record) -> str:
    """The warning for a skipped step."""
    values = ", ".join(f"{name} {record[name]:.4g}" for name in ESSENTIAL[:2])
    return (
      f"the update of step {record['step']} is skipped ({values}; {self.streak} consecutive, {self.total} in total); "
      "the "
      f"index of its batch is {record['batch']}"
    )
