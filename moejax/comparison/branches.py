"""Shorter training budgets from the same runs: branches of a run with warm-up, a stable learning rate and decay.

A branch is the run of a shorter budget. Until its decay begins, it has the learning rates and the batches of the whole
run, so it starts from a copy of the checkpoint of that step and trains its decay alone. If there is no copy, the same
command trains it from the start, with the same result.
"""

import dataclasses
import itertools

from moejax.config.experiment import Experiment
from moejax.config.schedule import WarmupStableDecay
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Branch:
  """The run of a member with a shorter budget."""

  experiment: Experiment
  fraction: float
  """Of the whole budget."""
  steps: int
  begin: int
  """Number of steps that it has in common with the whole run."""


def branch(whole: Experiment, steps: int, fraction: float) -> Branch:
  """The branch of a run of `steps` steps.

  Raises:
    UserError: If its budget is not longer than the warm-up of the whole run.
  """
  schedule, short = whole.optimizer.schedule, max(1, round(fraction * steps))
  assert isinstance(schedule, WarmupStableDecay)
  warmup = schedule.warmup_steps(steps)
  if short <= warmup:
    raise UserError(
      f"shorter_budgets={fraction} is {short} steps of {whole.name}, but its warm-up has {warmup}; use a larger "
      "fraction or lower optimizer.schedule.warmup_fraction"
    )
  # Half a step less, so that rounding up gives the same number of steps despite rounding errors.
  own = dataclasses.replace(schedule, warmup_fraction=max(0.0, (warmup - 0.5) / short))
  alike = itertools.takewhile(lambda step: own.fraction(step, short) == schedule.fraction(step, steps), range(short))
  experiment = dataclasses.replace(
    whole,
    name=whole.branch_name(fraction),
    training=dataclasses.replace(whole.training, steps=short),
    optimizer=dataclasses.replace(whole.optimizer, schedule=own),
  )
  return Branch(experiment, fraction, short, sum(1 for _ in alike))
