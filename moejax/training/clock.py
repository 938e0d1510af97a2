"""The speed of training: tokens per second, model FLOPs, and the model FLOPs utilization (MFU).

L stacked layers
"""

import collections
import dataclasses
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np

from moejax.config.chips import peak_flops
from moejax.config.model import Model
from moejax.config.parameters import flops_per_token_at
from moejax.training.loss import Metrics
from moejax.training.metrics import Record
from moejax.training.state import TrainSpec

DROPPED = "router/dropped_fraction"


@dataclasses.dataclass(frozen=True)
class Work:
  """The work of one training step on all devices."""

  tokens: int
  """Number of targets, without padding and other targets of weight 0."""
  choices_per_token: float | None = None
  """Accepted choices of experts per token that reaches a sparse layer, averaged over these tokens of all sparse layers.
  None without sparse layers."""
  dropped_fraction: float | None = None
  """Fraction of the choices that were dropped."""

  def flops(self, model: Model, sequence_length: int) -> float:
    """Model FLOPs of the step."""
    return self.tokens * flops_per_token_at(model, sequence_length, self.choices_per_token)


def fetch_work(metrics: Metrics) -> Work:
  """The work of a step. Waits for the step to end."""
  names = ("target_tokens", "router/choices", "router/choices_per_token", DROPPED)
  fetched = jax.device_get({name: metrics[name] for name in names if name in metrics})
  tokens = int(fetched["target_tokens"])
  if DROPPED not in fetched:
    return Work(tokens)
  choices_L = np.asarray(fetched["router/choices"], np.float64).sum(axis=-1)
  if not choices_L.any():
    return Work(tokens, 0.0, 0.0)
  dropped = np.asarray(fetched[DROPPED], np.float64) @ choices_L / choices_L.sum()
  # With a mixture of depths, some tokens skip some layers. A layer without choices counts as one with the most tokens.
  per_token_L = np.asarray(fetched["router/choices_per_token"], np.float64)
  tokens_L = np.divide(choices_L, per_token_L, out=np.zeros_like(choices_L), where=per_token_L > 0)
  tokens_L[per_token_L == 0] = tokens_L.max()
  return Work(tokens, float((1 - dropped) * choices_L.sum() / tokens_L.sum()), float(dropped))


def total_peak_flops(spec: TrainSpec) -> float | None:
  """Peak bfloat16 FLOP/s of all devices of a mesh, or None if unknown."""
  peak = peak_flops(spec.partitioner.device.device_kind)
  return peak and peak * spec.partitioner.mesh.size


STALL, RECENT_STEPS = 3.0, 51
"""A step is a stall if it takes longer than this factor times the median of this number of recent steps."""


def stall_s(elapsed_s: float, recent_s: Sequence[float]) -> float:
  """Seconds by which a step took longer than usual, or 0 if it is no stall."""
  if len(recent_s) < RECENT_STEPS // 5:
    return 0.0
  usual_s = statistics.median(recent_s)
  return elapsed_s - usual_s if elapsed_s > STALL * usual_s else 0.0


class Clock:
  """Measures the time from the end of one step to the end of the next, without evaluation and compilation."""

  def __init__(self, spec: TrainSpec, total_s: float = 0.0, tokens: int = 0):
    """`total_s` and `tokens` are those of the steps before the run was resumed."""
    self.total_s, self.tokens = total_s, tokens
    self._model = spec.experiment.model
    self._sequence_length = spec.experiment.data.sequence_length
    self._peak = total_peak_flops(spec)
    self._since_written: list[tuple[float, Work]] = []
    self._recent_s: collections.deque[float] = collections.deque(maxlen=RECENT_STEPS)
    self.stalled_s = 0.0
    """Seconds by which the last step took longer than usual."""
    self.restart()

  def restart(self) -> None:
    """Starts timing a step."""
    self._last = time.perf_counter()

  def lap(self, work: Work) -> Record:
    """Ends a step and returns the mean speed since the last call of `mean`. The speed of a single step would be
    misleading, because the host may notice the end of a step late."""
    now = time.perf_counter()
    elapsed_s, self._last = now - self._last, now
    self.stalled_s = stall_s(elapsed_s, self._recent_s)
    self._recent_s.append(elapsed_s)
    self.total_s += elapsed_s
    self.tokens += work.tokens
    self._since_written.append((elapsed_s, work))
    return self._speed(self._since_written)

  def mean(self) -> Record:
    """The mean speed of the steps since the last call."""
    laps, self._since_written = self._since_written, []
    return self._speed(laps)

  def _speed(self, laps: list[tuple[float, Work]]) -> Record:
    return speed(laps, self._model, self._sequence_length, self._peak)


def speed(laps: list[tuple[float, Work]], model: Model, sequence_length: int, peak_flops: float | None) -> Record:
  """Mean step time, tokens per second, dropped fraction and MFU of steps with these durations and this work."""
  total_s = sum(elapsed_s for elapsed_s, _ in laps)
  record: Record = {
    "step_time_s": total_s / len(laps),
    "tokens_per_s": sum(work.tokens for _, work in laps) / total_s,
  }
  dropped = [work.dropped_fraction for _, work in laps if work.dropped_fraction is not None]
  if dropped:
    record[DROPPED] = sum(dropped) / len(dropped)
  if peak_flops:
    record["mfu"] = sum(work.flops(model, sequence_length) for _, work in laps) / (total_s * peak_flops)
  return record
