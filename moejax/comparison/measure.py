"""Measures the step times of all members of a suite on the available devices.

E experts  L stacked layers
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from moejax import processes
from moejax.comparison.measurements import Turn, Turns
from moejax.config.experiment import Measurement
from moejax.partitioning import to_devices
from moejax.training.clock import Work, fetch_work
from moejax.training.loop import fetch_essential, rows_of_process
from moejax.training.loss import Metrics
from moejax.training.optimizers import learning_rate
from moejax.training.prepare import Prepared


def measure(
  pairs: Sequence[Mapping[str, Prepared]],
  measurement: Measurement,
  is_narrow: Callable[[Turns, Sequence[str]], bool],
  observe: Callable[[str, int, dict[str, float]], None],
) -> dict[str, list[Turn]]:
  """Measures the step time of each member. Members take turns of a few steps, so that changes in machine speed affect
  all of them equally, in alternating order, so that a steady change has no effect.

  A pair is measured until its ratios are known well enough, at least `measurement.rounds` and at most
  `measurement.round_limit` rounds.

  Each member trains from its initial parameters on its own input, so that the load of its router is realistic. A step
  lasts from the end of the previous step to its own end, including input, as in axlearn. The trained parameters are
  discarded.

  Args:
    pairs: prepared members by name. The measured programs are those that train the members.
    measurement: number of rounds and steps.
    is_narrow: whether these turns of the members of a pair, the first of which is dense, need no further round.
    observe: called with the name of a member, the number of rounds so far, and the loss and median step time of a turn.
  """
  of_member = {name: _Steps(member) for pair in pairs for name, member in pair.items()}
  processes.wait_for_all()
  for name, steps in of_member.items():
    turn, loss = steps.run(measurement.warmup_steps)
    observe(name, 0, {"loss": loss, "step_time_s": turn.step_time_s})
  turns: dict[str, list[Turn]] = {name: [] for name in of_member}
  measured = [list(pair) for pair in pairs]
  for done in range(1, measurement.round_limit + 1):
    order = [name for pair in measured for name in pair]
    for name in order if done % 2 else reversed(order):
      turn, loss = of_member[name].run(measurement.steps_per_round)
      turns[name].append(turn)
      observe(name, done, {"loss": loss, "step_time_s": turn.step_time_s})
    if done >= measurement.rounds:
      measured = processes.first(lambda: [pair for pair in measured if not is_narrow(turns, pair)])  # noqa: B023
    if not measured:
      break
  return turns


class _Steps:
  """Trains a member a few steps at a time."""

  def __init__(self, member: Prepared):
    self._member = member
    experiment = member.spec.experiment
    self._state = member.spec.init_state(experiment.training.seed)
    self._batches = member.batches()
    self._local = rows_of_process(member.spec)
    self._rate = np.float32(learning_rate(experiment.optimizer, 0, 100))

  def run(self, steps: int) -> tuple[Turn, float]:
    """Times `steps` steps and returns them and the last loss. Metrics are fetched one step late, as in training."""
    times_s: list[float] = []
    works: list[Work] = []
    waiting, last = None, 0.0
    for i in range(steps + 1):  # one more step, since the first only fills the queue
      batch = to_devices(next(self._batches), self._member.spec.partitioner.batch, self._local)
      self._state, metrics = self._member.step(self._state, batch, self._rate)
      if waiting is not None:
        loss, work = fetch_essential(waiting)["loss"], fetch_work(waiting)
        now = time.perf_counter()
        if i > 1:
          times_s.append(now - last)
          works.append(work)
        last = now
      waiting = metrics
    assert waiting is not None
    jax.block_until_ready(waiting)
    times_s.append(time.perf_counter() - last)
    works.append(fetch_work(waiting))
    turn = Turn(
      step_times_s=tuple(round(seconds, 6) for seconds in times_s),
      choices_per_token=_mean([work.choices_per_token for work in works]),
      dropped_fraction=_mean([work.dropped_fraction for work in works]),
      load_max_over_mean=_load(waiting),
    )
    return turn, loss


def _load(metrics: Metrics) -> float | None:
  """Load of the most loaded expert divided by the mean load, averaged over layers. None without sparse layers."""
  if "router/load" not in metrics:
    return None
  load_LE = np.asarray(jax.device_get(metrics["router/load"]), np.float64)
  return float((load_LE.max(axis=1) * load_LE.shape[1]).mean())


def _mean(values: Sequence[float | None]) -> float | None:
  present = [value for value in values if value is not None]
  return statistics.fmean(present) if present else None
