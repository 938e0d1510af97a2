"""Writes docs/step-time.md: predicted against published step times.

`python docs/step_time.py` needs `pip install moejax[tpu]` and minutes for each program that is not remembered.
"""

import dataclasses
import itertools
import math
import pathlib
from typing import Any

from moejax import lookup
from moejax.config.chips import CHIPS
from moejax.config.parameters import flops_per_token, tokens_per_step
from moejax.display import Display
from moejax.overrides import override
from moejax.planning.topology import parse_topology, prepare_environment


@dataclasses.dataclass(frozen=True)
class Run:
  """A step that somebody timed."""

  topology: str
  name: str
  source: str
  fields: str = ""
  """Options that differ from the experiment."""
  seconds: float | None = None
  teraflops: float | None = None
  """A second and chip, where that is published and not the time."""

  @property
  def experiment(self) -> Any:
    return override(lookup.find_experiment(self.name), self.fields.split())

  @property
  def published_s(self) -> float:
    if self.seconds is not None:
      return self.seconds
    experiment = self.experiment
    flops = tokens_per_step(experiment) * flops_per_token(experiment.model, experiment.data.sequence_length)
    assert self.teraflops is not None
    return flops / parse_topology(self.topology).devices / (self.teraflops * 1e12)


TENSOR = "--mesh.data 16 --mesh.model 4 --model.remat dots --training.gradient-accumulation 2"
MAXTEXT_V5P = "MaxText, configs/v5p/README.md"
MAXTEXT_V5E = "MaxText, configs/v5e/README.md"
RECIPES = "tpu-recipes, training/trillium"

CALIBRATING = (
  Run("v5p:4x8x8", "fuji_7b_v1", "axlearn, fuji.py: 7B v1 on tpu-v5p-512 (256 chips)", seconds=2.85),
  Run(
    "v5p:4x4x4", "maxtext_32b", f"{MAXTEXT_V5P}: 32B on v5p-128 (64 chips)",
    f"--training.batch-size 448 --evaluation.batch-size 64 {TENSOR}", teraflops=328,
  ),
  Run(
    "v4:8x8x8", "fuji_7b_v1", "axlearn, fuji.py: 7B v1 on tpu-v4-1024 (512 chips)",
    "--mesh.replica 32 --mesh.data 16", seconds=3.03,
  ),
  Run("v5e:16x16", "maxtext_16b", f"{MAXTEXT_V5E}: 16B", teraflops=120),
  Run("v5e:16x16", "maxtext_32b", f"{MAXTEXT_V5E}: 32B", teraflops=132),
  Run(
    "v6e:2x4", "mistral_7b", f"{RECIPES}/Mistral-7B-MaxText",
    "--model.remat attention --training.gradient-accumulation 6", seconds=6.320,
  ),
)  # fmt: skip

CHECKING = (
  Run(
    "v5p:4x4x4", "maxtext_64b", f"{MAXTEXT_V5P}: 64B on v5p-128 (64 chips)",
    f"--training.batch-size 192 --evaluation.batch-size 64 {TENSOR}", teraflops=323,
  ),
  Run(
    "v5p:4x4x8", "mixtral_8x7b",
    "MaxText, docs/reference/models/tiering.md: Mixtral 8x7B, 2,909 tokens a second and chip",
    "--training.batch-size 4608 --evaluation.batch-size 128 --mesh.data 128 --mesh.expert 1 "
    "--model.moe.dispatch grouped --model.remat layer_inputs", seconds=36 * 4096 / 2909,
  ),
)  # fmt: skip

prepare_environment(parse_topology(CALIBRATING[0].topology))  # JAX reads it when it is imported

# ruff: noqa: E402
from moejax.planning.plan import plan

PAGE = pathlib.Path(__file__).parent / "step-time.md"

HEAD = """# Is the predicted step time true?

Written by `python docs/step_time.py`. A plan adds up, for the very train step that runs,

- the compiler's own cycle estimate of every operation, loops by their trip counts, over the chip's clock;
- kernels, which the compiler does not see into, by a roofline: their products at peak, then their vector operations,
  or their bytes where those take longer;
- copies and collectives, as far as nothing goes on beside them: bytes over the rate of the links that their mesh axis
  has in the torus (`moejax/planning/collectives.py`); those that are under way at once along one dimension of the torus
  share its links evenly (`moejax/planning/links.py`), which is an assumption that no run here tells from a queue;

and divides all but the exposed collectives by one efficiency of the chip, its only calibrated number
(`moejax/config/chips.py`). What it knows nothing of: input, checkpoints, stragglers, throttling.

Other frameworks ran these models, by programs that differ from moejax's: attention's kernel, what is kept for the
backward pass and where. So an efficiency is in part theirs.

## The runs that it is calibrated on

| topology | experiment, options | published, s | uncalibrated, s | efficiency | predicted, s | predicted / published |
|---|---|---|---|---|---|---|
"""

CHECKED = """

| chip | efficiency | from |
|---|---|---|
{chips}

Where a chip has two runs its efficiency is their geometric mean. Predicted with the efficiency of the other one alone:
{alone}.

## Runs that it is not calibrated on

| topology | experiment, options | published, s | predicted, s | predicted / published |
|---|---|---|---|---|
"""

FOOT = """
{checked}

## Sources

{sources}

Where FLOP/s are published and not the time, the time follows from the FLOPs as MaxText counts them: six a parameter
and token, and attention without its causal half taken off. Mistral moved to the host what it kept of attention, and is
planned in several parts of the batch instead. Mistral, Mixtral and the 32B on v5e want more memory here than a chip
has, and are planned all the same. Mixtral's batch is that of its recipe, and its slice has the shape that the table
names (8x4x4, where it also says 256 chips). axlearn keeps the projections of attention and computes the feed-forward
again, as `remat="attention"` does here.

GPU and CPU have no cycle estimates: their plans are rooflines of the program that XLA makes for CPU, a lower bound.
"""


def main() -> None:
  """Plans every published run and writes the page."""
  with Display("step time") as display:
    found = {run: plan(run.experiment, parse_topology(run.topology), display) for run in (*CALIBRATING, *CHECKING)}
  calibrating = "\n".join(_calibrating_line(run, found[run]) for run in CALIBRATING)
  checked = "\n".join(_checked_line(run, found[run]) for run in CHECKING)
  ratios = [found[run]["step_time_s"] / run.published_s - 1 for run in CHECKING]
  verdict = f"They are off by {min(ratios):+.0%} to {max(ratios):+.0%}; the goal is 20 %."
  sources = "\n".join(f"- {run.topology}, {run.name}: {run.source}{_rate(run)}" for run in (*CALIBRATING, *CHECKING))
  parts = [HEAD, calibrating, CHECKED.format(chips=_chips(found), alone=_alone(found)), checked, "\n"]
  PAGE.write_text("".join(parts) + FOOT.format(checked=verdict, sources=sources))


def _chips(found: dict[Run, dict[str, Any]]) -> str:
  lines = []
  for chip in CHIPS.values():
    if chip.platform != "tpu":
      continue
    exact = [_efficiency(run, found[run]) for run in CALIBRATING if parse_topology(run.topology).chip == chip]
    mean = math.exp(sum(map(math.log, exact)) / len(exact)) if exact else None
    origin = f"{len(exact)} above: {mean:.3f}" if mean else "none: the mean of those that have one"
    lines.append(f"| {chip.name} | {chip.efficiency:.3f} | {origin} |")
  return "\n".join(lines)


def _alone(found: dict[Run, dict[str, Any]]) -> str:
  """By how much each of two runs of a chip is off with the efficiency of the other."""
  parts = []
  for run, other in itertools.permutations(CALIBRATING, 2):
    if parse_topology(run.topology).chip == parse_topology(other.topology).chip:
      exposed_s = found[run]["breakdown_s"]["collective_exposed"]
      step_s = exposed_s + (_uncalibrated_s(found[run]) - exposed_s) / _efficiency(other, found[other])
      parts.append(f"{run.topology}, {run.name} {step_s / run.published_s - 1:+.0%}")
  return "; ".join(parts)


def _uncalibrated_s(found: dict[str, Any]) -> float:
  exposed_s, step_s = found["breakdown_s"]["collective_exposed"], found["step_time_s"]
  return exposed_s + (step_s - exposed_s) * parse_topology(found["topology"]).chip.efficiency


def _efficiency(run: Run, found: dict[str, Any]) -> float:
  """With which the prediction would be the published time."""
  exposed_s = found["breakdown_s"]["collective_exposed"]
  return (_uncalibrated_s(found) - exposed_s) / (run.published_s - exposed_s)


def _what(run: Run) -> str:
  return f"| {run.topology} | {run.name}{f' `{run.fields}`' if run.fields else ''} | {run.published_s:.3f} |"


def _calibrating_line(run: Run, found: dict[str, Any]) -> str:
  step_s = found["step_time_s"]
  exact = f"{_uncalibrated_s(found):.3f} | {_efficiency(run, found):.3f}"
  return f"{_what(run)} {exact} | {step_s:.3f} | {step_s / run.published_s:.3f} |"


def _checked_line(run: Run, found: dict[str, Any]) -> str:
  step_s = found["step_time_s"]
  return f"{_what(run)} {step_s:.3f} | {step_s / run.published_s:.3f} |"


def _rate(run: Run) -> str:
  return "" if run.teraflops is None else f", {run.teraflops:.0f} TFLOP/s a chip"


if __name__ == "__main__":
  main()
