"""Measures the decoding of trained runs on this machine, which corrects the roofline of serving."""

import dataclasses
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax

from moejax.config.chips import CHIPS, chip_of
from moejax.decision.serving import serving
from moejax.errors import UserError
from moejax.inference.generate import Generator
from moejax.inference.load import load_run
from moejax.progress import SILENT, Progress

SEQUENCES, STEPS = 8, 24
"""Number of sequences that are decoded at a time, and of decoding steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredDecoding:
  """The decoding step of one run."""

  run: str
  is_dense: bool
  device: str
  sequences: int
  step_time_s: float
  """Median over the second half of the steps."""
  roofline_s: float
  """The same by the roofline."""

  @property
  def over_roofline(self) -> float:
    return self.step_time_s / self.roofline_s

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {"tokens_per_s": self.sequences / self.step_time_s}


def measure_decoding(directories: Sequence[pathlib.Path], progress: Progress = SILENT) -> tuple[MeasuredDecoding, ...]:
  """Measures each run.

  Raises:
    UserError: If there is no checkpoint, or not at least one dense and one MoE run.
  """
  found = []
  for directory in directories:
    progress.stage(f"measuring the decoding of {directory}")
    found.append(_measured(directory))
  if {one.is_dense for one in found} != {True, False}:
    raise UserError("--measure needs a dense and an MoE run, whose decoding is compared; give at least one of each")
  return tuple(found)


def correction(measured: Sequence[MeasuredDecoding]) -> float:
  """Measured time over roofline of MoE runs, divided by that of dense runs; geometric means."""
  dense, sparse = ([math.log(one.over_roofline) for one in measured if one.is_dense == kind] for kind in (True, False))
  return math.exp(statistics.mean(sparse) - statistics.mean(dense))


def _measured(directory: pathlib.Path) -> MeasuredDecoding:
  loaded = load_run(directory, decode=True)
  experiment, shards = loaded.experiment, loaded.model.partitioner.shards("batch")
  sequences = shards * max(1, math.ceil(SEQUENCES / shards))
  steps = min(STEPS, experiment.data.sequence_length - 1)
  times: list[float] = []

  def observe(index: int, continuation: list[int]) -> None:
    if index == 0:
      times.append(time.perf_counter())

  prompts, stops = [[0]] * sequences, [lambda tokens: False] * sequences
  generator = Generator(loaded.model, sequences, experiment.model.vocab_size)
  list(generator.generate(loaded.parameters, prompts, stops, steps, observe=observe))
  intervals = [after - before for before, after in itertools.pairwise(times)]
  device = jax.devices()[0].device_kind
  roofline = serving(experiment, chip_of(device) or CHIPS["cpu"], sequences, context=steps)
  devices = loaded.model.partitioner.mesh.size
  return MeasuredDecoding(
    run=str(directory),
    is_dense=experiment.model.moe is None,
    device=device,
    sequences=sequences,
    step_time_s=statistics.median(intervals[len(intervals) // 2 :]),
    roofline_s=roofline.step_time_s * roofline.devices / devices,
  )
