"""Stands for the counts of a corpus where tests of budgets need no text."""

import math

from moejax.config.parameters import full_sequence_steps, tokens_per_step


class Filled:
  """Counts sequences of which a part is real."""

  def __init__(self, fill: float = 1.0):
    self.fill = fill

  def steps(self, experiment):
    return experiment.training.steps or math.ceil(full_sequence_steps(experiment) / self.fill)

  def tokens(self, experiment, steps):
    return int(steps * tokens_per_step(experiment) * self.fill)
