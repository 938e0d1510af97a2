"""Where the time of a run went that trained nothing: goodput is the other part of it."""


class Goodput:
  """Seconds lost by cause, over all processes that worked on a run."""

  def __init__(self, lost_s: dict[str, float]):
    self.lost_s = dict(lost_s)

  def add(self, cause: str, seconds: float) -> None:
    """So many more seconds were lost by this cause."""
    self.lost_s[cause] = self.lost_s.get(cause, 0.0) + seconds

  def summary(self, train_time_s: float) -> dict[str, float]:
    """The fraction of the time in which steps were trained that count, and the seconds lost by cause.

    `train_time_s` is of all steps, those that were skipped among them.
    """
    productive_s = train_time_s - self.lost_s.get("skipped_s", 0.0)
    other_s = sum(seconds for cause, seconds in self.lost_s.items() if cause != "skipped_s")
    return {"fraction": productive_s / (train_time_s + other_s), **self.lost_s}
