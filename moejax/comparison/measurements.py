"""The measured step times of a comparison: sessions, in each of which members take turns in rounds.

The first session is before training, and the budgets depend on it alone. After each run, the members of its pair are
measured again for a few rounds, since the speed of a machine can change. The step time ratio of a pair comes from all
sessions.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.comparison.record import known
from moejax.comparison.statistics import Ends, Estimate, geometric_mean


@dataclasses.dataclass(frozen=True)
class Turn:
  """A few successive steps of one member."""

  step_times_s: tuple[float, ...]
  """Seconds of each step."""
  choices_per_token: float | None = None
  """Accepted choices of experts per token. None for a dense model."""
  dropped_fraction: float | None = None
  """Fraction of choices that were dropped."""
  load_max_over_mean: float | None = None
  """Load of the most loaded expert divided by the mean load, averaged over layers."""

  @property
  def step_time_s(self) -> float:
    """Median in seconds, which ignores single delayed steps."""
    return statistics.median(self.step_times_s)


Turns = Mapping[str, Sequence[Turn]]
"""The turns of each member. Those of the members of a pair belong to the same rounds."""


@dataclasses.dataclass(frozen=True)
class Session:
  """Rounds that were measured together."""

  moment: str
  """When it was: "before training", or "after NAME" for a run."""
  at_s: float
  """When it ended, in seconds since 1970."""
  turns: Turns


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled training step of a member."""

  compile_time_s: float
  """Seconds to trace and compile it."""
  peak_flops: float | None
  """Peak FLOP/s of all devices in bfloat16, or None if unknown."""


@dataclasses.dataclass(frozen=True)
class Timing:
  """The step time of one member in the session before training."""

  step_time_s: float
  """Geometric mean over rounds of the median of each round, in seconds."""
  step_time_interval_s: Ends
  """Confidence interval at 95 %."""
  step_time_spread: float
  """Interquartile range of all steps divided by the step time."""
  compile_time_s: float
  peak_flops: float | None
  choices_per_token: float | None = None
  dropped_fraction: float | None = None
  load_max_over_mean: float | None = None
  """Means over all turns."""


@dataclasses.dataclass(frozen=True)
class Measurements:
  """The content of measurements.json."""

  programs: Mapping[str, Program]
  sessions: tuple[Session, ...]

  def timing(self, name: str) -> Timing:
    """The step time of a member before training."""
    turns, program = self.sessions[0].turns[name], self.programs[name]
    step_time = geometric_mean([_logarithms(turns)])
    steps_s = [seconds for turn in turns for seconds in turn.step_times_s]
    low, _, high = statistics.quantiles(steps_s, n=4) if len(steps_s) > 1 else (0.0, 0.0, 0.0)
    means = {field: _mean([getattr(turn, field) for turn in turns]) for field in OF_ROUTERS}
    return Timing(
      step_time.value,
      step_time.interval,
      (high - low) / step_time.value,
      program.compile_time_s,
      program.peak_flops,
      **means,
    )

  def ratio(self, dense: str, moe: str) -> Estimate:
    """Step time of a candidate divided by that of its dense model, over all sessions."""
    return step_time_ratio(self._with_both(dense, moe), dense, moe)

  def rounds(self, dense: str, moe: str) -> int:
    """Number of rounds in which both were measured."""
    return sum(len(turns[moe]) for turns in self._with_both(dense, moe))

  def _with_both(self, dense: str, moe: str) -> list[Turns]:
    return [session.turns for session in self.sessions if {dense, moe} <= session.turns.keys()]

  def after(self, session: Session) -> "Measurements":
    """These measurements and another session."""
    return dataclasses.replace(self, sessions=(*self.sessions, session))

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


OF_ROUTERS = ("choices_per_token", "dropped_fraction", "load_max_over_mean")
"""Fields of a turn that only models with sparse layers have."""


def step_time_ratio(sessions: Sequence[Turns], dense: str, moe: str) -> Estimate:
  """Step time of a candidate divided by that of its dense model. Rounds are paired, so that changes in machine speed
  that affect both do not matter."""
  return geometric_mean([_logarithms(turns[moe]) - _logarithms(turns[dense]) for turns in sessions])


def measurements_from_json(content: Any, pairs: Sequence[Sequence[str]]) -> Measurements:
  """Reads what `Measurements.to_json` returned for pairs whose members have these names.

  Raises:
    ValueError, TypeError, KeyError or AttributeError: If it is something else.
  """
  programs = {name: Program(**program) for name, program in content["programs"].items()}
  sessions = tuple(
    Session(
      session["moment"],
      session["at_s"],
      {name: [_turn(turn) for turn in turns] for name, turns in session["turns"].items()},
    )
    for session in content["sessions"]
  )
  found, names = Measurements(programs, sessions), [name for pair in pairs for name in pair]
  if set(programs) != set(names) or not sessions or set(sessions[0].turns) != set(names):
    raise ValueError("it has other members")
  if not all(session.turns.keys() <= set(names) and known(session.at_s) for session in sessions):
    raise ValueError("a session is not valid")
  for turns in (session.turns for session in sessions):
    if not all(turns.values()) or any(len({len(turns[n]) for n in pair if n in turns}) > 1 for pair in pairs):
      raise ValueError("members of a pair do not have the same rounds")
  if not all(known(p.compile_time_s) and (p.peak_flops is None or known(p.peak_flops)) for p in programs.values()):
    raise ValueError("a program is not valid")
  return found


def _turn(content: Mapping[str, Any]) -> Turn:
  turn = Turn(**{**content, "step_times_s": tuple(content["step_times_s"])})
  if not turn.step_times_s or not all(known(seconds) and seconds > 0 for seconds in turn.step_times_s):
    raise ValueError("a step time is not valid")
  if not all(getattr(turn, field) is None or known(getattr(turn, field)) for field in OF_ROUTERS):
    raise ValueError("a turn is not valid")
  return turn


def _logarithms(turns: Sequence[Turn]) -> np.ndarray:
  return np.log([turn.step_time_s for turn in turns])


def _mean(values: Sequence[float | None]) -> float | None:
  present = [value for value in values if value is not None]
  return statistics.fmean(present) if present else None
