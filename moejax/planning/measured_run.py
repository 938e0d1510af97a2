"""What a finished run has measured for plans: its step time and its router loads."""

import dataclasses
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from moejax.config.chips import chip_of
from moejax.config.experiment import Experiment
from moejax.errors import UserError, reason
from moejax.files import parse_record, read_json
from moejax.planning.topology import Topology
from moejax.training.run_directory import read_experiment

LAST = 0.1
"""The router loads of a run are those of this last part of its records."""

LARGEST = 1e12
"""Numbers of a record are below this, or it is damaged."""

Loads = Sequence[Sequence[float]]
"""Fractions of the choices of a step that each expert of each sparse layer gets."""


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
  """A finished run."""

  directory: pathlib.Path
  experiment: Experiment
  chip: str
  """The name of its chip or, if plans do not know it, of its devices."""
  devices: int
  step_times_s: tuple[float, ...]
  loads: tuple[Loads, ...]
  """One per record of its last part. Empty if it has no sparse layers."""

  def median_step_s(self, option: str) -> float:
    """The median step time without that of the first record, which may include compilation.

    Raises:
      UserError: If there are fewer than two records with a step time.
    """
    if len(self.step_times_s) < 2:
      raise UserError(f"{option} {self.directory}: the run has fewer than two records with a step time; train longer")
    return statistics.median(self.step_times_s[1:])

  def load(self, groups: int) -> float:
    """The load of the busiest of `groups` equal groups of consecutive experts divided by the mean load: the mean over
    the records, and the maximum over layers."""
    layers = zip(*self.loads, strict=True)
    return max(statistics.fmean(_busiest(shares, groups) for shares in layer) for layer in layers)


def read_measured_run(directory: pathlib.Path, option: str) -> MeasuredRun:
  """Reads a finished run. `option` is the command-line option that names it.

  Raises:
    UserError: If the directory has no finished run, or a file is damaged.
  """
  experiment = read_experiment(directory)
  try:
    ran = read_json(directory / "summary.json")["provenance"]
    kind, count = ran["device_kind"], ran["device_count"]
    if not isinstance(kind, str) or type(count) is not int:
      raise ValueError(f"provenance has device_kind={kind!r} and device_count={count!r}")
    records = [parse_record(line) for line in (directory / "metrics.jsonl").read_bytes().split(b"\n") if line.strip()]
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise UserError(
      f"{option} {directory}: the run has not finished, or a file is damaged ({reason(error)[:100]}); resume or repeat "
      "it"
    ) from error
  chip = chip_of(kind)
  steps = [record for record in records if record is not None]
  times = tuple(time for record in steps if (time := _number(record.get("step_time_s"))))
  loads = [load for record in steps if (load := _loads(record.get("router/load"), experiment)) is not None]
  last = loads[-max(1, round(LAST * len(loads))) :]
  return MeasuredRun(directory, experiment, chip.name if chip else kind, count, times, tuple(last))


def check_same_step(run: MeasuredRun, experiment: Experiment, topology: Topology, option: str) -> None:
  """Checks that a run has trained the step of an experiment on a topology.

  Raises:
    UserError: If its model, batch, or kind or number of devices is another.
  """
  for what, of in (("model", lambda e: e.model), ("sequence length", lambda e: e.data.sequence_length),
                   ("batch size", lambda e: e.training.batch_size),
                   ("gradient accumulation", lambda e: e.training.gradient_accumulation)):  # fmt: skip
    if of(run.experiment) != of(experiment):
      raise UserError(
        f"{option} {run.directory}: the run has another {what}; plan {run.directory}/experiment.json instead"
      )
  if run.chip != topology.chip.name or run.devices != topology.devices:
    raise UserError(
      f"{option} {run.directory}: the run used {run.devices} devices of the kind {run.chip}, but {topology.name} has "
      f"{topology.devices} of {topology.chip.name}; use the topology of the run"
    )


def _busiest(shares: Sequence[float], groups: int) -> float:
  size = len(shares) // groups
  return groups * max(sum(shares[i : i + size]) for i in range(0, len(shares), size)) / sum(shares)


def _number(value: Any) -> float | None:
  """A positive number, or None. Infinity and NaN are None in a record."""
  return value if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LARGEST else None


def _loads(value: Any, experiment: Experiment) -> Loads | None:
  """The loads of a record, or None if it has none or is damaged."""
  model = experiment.model
  if model.moe is None or not isinstance(value, list) or len(value) != model.num_sparse_layers:
    return None
  whole = all(
    isinstance(layer, list)
    and len(layer) == model.moe.num_experts
    and all(share == 0 or _number(share) for share in layer)
    and sum(layer) > 0
    for layer in value
  )
  return value if whole else None
