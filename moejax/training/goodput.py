"""Accounts for lost time. Goodput is the fraction of the time of a run that was spent on useful training steps."""

WITHIN_STEPS = ("skipped_s", "input_s", "stalled_s")
"""Causes whose seconds are part of the time of steps: skipped steps, waiting for input, and single steps that took much
longer than usual."""


class Goodput:
  """Lost seconds by cause, since the start of the run."""

  def __init__(self, lost_s: dict[str, float]):
    self.lost_s = dict(lost_s)

  def add(self, cause: str, seconds: float) -> None:
    """Adds seconds that were lost by this cause."""
    self.lost_s[cause] = self.lost_s.get(cause, 0.0) + seconds

  def summary(self, train_time_s: float) -> dict[str, float]:
    """Goodput, and lost seconds by cause. `train_time_s` is the total time of all steps, including skipped ones."""
    productive_s = max(0.0, train_time_s - sum(self.lost_s.get(cause, 0.0) for cause in WITHIN_STEPS))
    other_s = sum(seconds for cause, seconds in self.lost_s.items() if cause not in WITHIN_STEPS)
    return {"fraction": productive_s / (train_time_s + other_s), **self.lost_s}


def describe(goodput: dict[str, float]) -> str:
  """One line for the log: the fraction, and the causes by lost seconds."""
  lost = sorted(((seconds, cause) for cause, seconds in goodput.items() if cause != "fraction"), reverse=True)
  causes = ", ".join(f"{cause.removesuffix('_s')} {seconds:.3g} s" for seconds, cause in lost if seconds > 0)
  return f"goodput {goodput['fraction']:.1%} of the training time" + (f"; lost: {causes}" if causes else "")
