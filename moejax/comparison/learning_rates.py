"""Chooses the learning rate of each member by short trials, if the suite has a sweep.

A trial is a run in DIR/learning_rates/ with a part of the budget. Its result, trial.json, is the mean training loss
over the last tenth of its steps, or null if it diverged.

Z = points of a curve
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moejax import processes
from moejax.comparison import curves
from moejax.comparison.quantities import count, percent
from moejax.comparison.record import Tried, known
from moejax.config.experiment import Experiment, Suite
from moejax.config.learning_rates import LearningRateSweep
from moejax.errors import UserError
from moejax.files import read_json, write_json

FOLDER = "learning_rates"
"""Folder of a comparison with the trials."""
RESULT = "trial.json"


@dataclasses.dataclass(frozen=True)
class Trial:
  """A short run of a member with one learning rate."""

  experiment: Experiment
  """The member with this learning rate and this length."""
  steps: int
  folder: str

  @property
  def learning_rate(self) -> float:
    return self.experiment.optimizer.learning_rate


def trials(experiment: Experiment, sweep: LearningRateSweep, steps: int) -> tuple[Trial, ...]:
  """The trials of a member whose budget is `steps` steps."""
  short = max(1, round(sweep.budget * steps))
  training = dataclasses.replace(
    experiment.training, steps=short, log_every=min(experiment.training.log_every, max(1, short // 1000))
  )
  found = []
  for factor in sweep.factors:
    rate = factor * experiment.optimizer.learning_rate
    tried = with_rate(dataclasses.replace(experiment, training=training), rate)
    found.append(Trial(tried, short, f"{experiment.name}-x{factor!r}"))
  return tuple(found)


def try_rate(trial: Trial, directory: pathlib.Path, train: Callable[[], Mapping[str, Any]]) -> None:
  """Trains a trial in its directory and writes its result. Its checkpoints are then deleted.

  Args:
    trial: the trial.
    directory: of its run.
    train: trains it and returns the content of summary.json, or raises FloatingPointError if it diverges.
  """
  try:
    train_time_s = train()["train_time_s"]
    loss = last_loss(directory, trial.steps)
  except FloatingPointError:
    train_time_s = loss = None

  def write() -> None:
    result = Tried(learning_rate=trial.learning_rate, loss=loss, steps=trial.steps, train_time_s=train_time_s)
    write_json(directory / RESULT, result.to_json())
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)

  processes.first_writes(write)


def last_loss(run: pathlib.Path, steps: int) -> float | None:
  """Mean training loss of a run over the last tenth of its steps."""
  steps_Z, loss_Z = curves.series(curves.read_metrics(run / "metrics.jsonl"), "loss")
  last = loss_Z[steps_Z > 0.9 * steps]
  return float(last.mean()) if len(last) else None


def read_tried(trial: Trial, directory: pathlib.Path) -> Tried | None:
  """The result of a trial, or None if it has none or it is damaged. The trial is then run again."""
  try:
    found = Tried(**read_json(directory / RESULT))
  except (OSError, ValueError, TypeError):
    return None
  numbers = [found.learning_rate, found.steps, *(x for x in (found.loss, found.train_time_s) if x is not None)]
  fits = all(map(known, numbers)) and (found.learning_rate, found.steps) == (trial.learning_rate, trial.steps)
  return found if fits else None


def chosen(name: str, tried: Sequence[Tried]) -> float:
  """The learning rate with the lowest loss.

  Raises:
    UserError: If all trials diverged.
  """
  losses = {each.learning_rate: each.loss for each in tried if each.loss is not None and each.learning_rate}
  if not losses:
    rates = ", ".join(count(each.learning_rate) for each in tried)
    raise UserError(
      f"training of {name} diverged with every learning rate of the sweep ({rates}); lower its "
      "optimizer.learning_rate or learning_rates.factors, and choose another --workdir"
    )
  return min(losses, key=lambda rate: losses[rate])


def with_rate(experiment: Experiment, learning_rate: float) -> Experiment:
  """The experiment with another learning rate."""
  return dataclasses.replace(
    experiment, optimizer=dataclasses.replace(experiment.optimizer, learning_rate=learning_rate)
  )


def method(suite: Suite) -> str:
  """How the learning rates of a suite are chosen, in sentences."""
  learning_rates = suite.learning_rates
  if not isinstance(learning_rates, LearningRateSweep):
    return "The learning rates are those of the suite. They were not tuned for each member."
  factors = [count(factor) for factor in learning_rates.factors]
  text = (
    f"The learning rate of each member was chosen from {', '.join(factors[:-1])} and {factors[-1]} times that of the "
    f"suite, by training loss after {percent(learning_rates.budget, 0)} of its budget."
  )
  if suite.upcycled:
    text += f" Upcycled candidates have that of the suite: {', '.join(suite.upcycled)}."
  return text
