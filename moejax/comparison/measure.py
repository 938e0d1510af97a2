"""Measures the step times of all members of a suite on the available devices."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from moejax import processes
from moejax.config.experiment import Measurement
from moejax.partitioning import to_devices
from moejax.training.clock import Work, fetch_work, total_peak_flops
from moejax.training.loop import fetch_essential, rows_of_process
from moejax.training.optimizers import learning_rate
from moejax.training.prepare import Prepared


@dataclasses.dataclass(frozen=True)
class Timing:
  """The measured step time of one member."""

  step_time_s: float
  """Median in seconds."""
  step_time_spread: float
  """Interquartile range divided by the median."""
  compile_time_s: float
  """Seconds to trace and compile the step."""
  peak_flops: float | None
  """Peak FLOP/s of all devices in bfloat16, or None if unknown."""
  samples_s: list[float]
  """Seconds of every timed step, in order."""
  choices_per_token: float | None = None
  """Accepted choices of experts per token, averaged over the timed steps. None for a dense model."""
  dropped_fraction: float | None = None
  """Fraction of choices that were dropped, averaged over the timed steps."""


def measure(
  members: Mapping[str, Prepared],
  measurement: Measurement,
  observe: Callable[[str, int, dict[str, float]], None],
) -> dict[str, Timing]:
  """Measures the step time of each member. Members take turns of a few steps, so that changes in machine speed affect
  all of them equally.

  Each member trains from its initial parameters on its own input, so that the load of its router is realistic. A step
  lasts from the end of the previous step to its own end, including input, as in axlearn. The trained parameters are
  discarded.

  Args:
    members: prepared members by name. The measured programs are those that train the members.
    measurement: number of rounds and steps.
    observe: called with the name of a member, the total number of steps so far, and the loss of the step.
  """
  turns = {name: _Turns(member) for name, member in members.items()}
  processes.wait_for_all()
  samples_s: dict[str, list[float]] = {name: [] for name in members}
  works: dict[str, list[Work]] = {name: [] for name in members}
  done = 0
  for turn in range(measurement.rounds + 1):
    steps = measurement.warmup_steps if turn == 0 else measurement.steps_per_round
    for name in members:
      times_s, done_in_them, loss = turns[name].run(steps)
      done += steps
      observe(name, done, {"loss": loss, "step_time_s": statistics.median(times_s)})
      if turn:
        samples_s[name] += times_s
        works[name] += done_in_them
  return {name: _timing(members[name], samples_s[name], works[name]) for name in members}


def total_steps(members: int, measurement: Measurement) -> int:
  """The total number of steps of `measure`."""
  return members * (measurement.warmup_steps + measurement.rounds * measurement.steps_per_round)


class _Turns:
  """Trains a member a few steps at a time."""

  def __init__(self, member: Prepared):
    self._member = member
    experiment = member.spec.experiment
    self._state = member.spec.init_state(experiment.training.seed)
    self._batches = member.batches()
    self._local = rows_of_process(member.spec)
    self._rate = np.float32(learning_rate(experiment.optimizer, 0, 100))

  def run(self, steps: int) -> tuple[list[float], list[Work], float]:
    """Returns the duration and work of `steps` steps and the last loss. Metrics are fetched one step late, as in
    training."""
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
    return times_s, works, loss


def _timing(member: Prepared, times_s: list[float], works: list[Work]) -> Timing:
  median = statistics.median(times_s)
  low, _, high = statistics.quantiles(times_s, n=4)
  choices = [work.choices_per_token for work in works if work.choices_per_token is not None]
  dropped = [work.dropped_fraction for work in works if work.dropped_fraction is not None]
  return Timing(
    step_time_s=median,
    step_time_spread=(high - low) / median,
    compile_time_s=member.compile_time_s,
    peak_flops=total_peak_flops(member.spec),
    samples_s=[round(x, 6) for x in times_s],
    choices_per_token=statistics.fmean(choices) if choices else None,
    dropped_fraction=statistics.fmean(dropped) if dropped else None,
  )
