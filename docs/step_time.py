"""Writes docs/step-time.md: predicted against published step times.

`python docs/step_time.py` needs `pip install moejax[tpu]` and minutes for each program that is not remembered.
"""

import dataclasses
import pathlib
import statistics
from typing import Any

from moejax import lookup
from moejax.config.chips import CHIPS
from moejax.config.parameters import flops_per_token, tokens_per_step
from moejax.display import Display
from moejax.overrides import override
from moejax.planning.topology import Topology, parse_topology, prepare_environment


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
  slices: int = 1

  @property
  def pod(self) -> Topology:
    return parse_topology(self.topology, self.slices)

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
    return flops / self.pod.devices / (self.teraflops * 1e12)


AXLEARN = "axlearn, fuji.py"
TENSOR = "--mesh.data 16 --mesh.model 4 --model.remat dots --training.gradient-accumulation 2"
MAXTEXT_V5P = "MaxText, configs/v5p/README.md"
MAXTEXT_V5E = "MaxText, configs/v5e/README.md"
RECIPES = "tpu-recipes, training/trillium"

CALIBRATING = (
  Run("v5p:4x8x8", "fuji_7b_v1", f"{AXLEARN}: 7B v1 on 256 v5p", seconds=2.85),
  Run(
    "v5p:4x4x4", "maxtext_32b", f"{MAXTEXT_V5P}: 32B on v5p-128 (64 chips)",
    f"--training.batch-size 448 --evaluation.batch-size 64 {TENSOR}", teraflops=328,
  ),
  Run(
    "v4:8x8x8", "fuji_7b_v1", f"{AXLEARN}: 7B v1 on 512 v4",
    "--mesh.replica 32 --mesh.data 16", seconds=3.03,
  ),
  Run(
    "v5e:16x16", "fuji_7b_v1", f"{AXLEARN}: 7B v1 on four slices of 256 v5e", "--mesh.data 256", seconds=2.44, slices=4
  ),
  Run("v5e:16x16", "maxtext_16b", f"{MAXTEXT_V5E}: 16B", teraflops=120),
  Run("v5e:16x16", "maxtext_32b", f"{MAXTEXT_V5E}: 32B", teraflops=132),
  Run(
    "v6e:2x4", "mistral_7b", f"{RECIPES}/Mistral-7B-MaxText",
    "--model.remat attention --training.gradient-accumulation 6", seconds=6.320,
  ),
  Run(
    "gpu:h100:256", "fuji_7b_v1", f"{AXLEARN}: 7B v1 on 256 H100", "--mesh.replica 32 --mesh.data 8", seconds=2.44
  ),
  Run(
    "gpu:h100:512", "fuji_7b_v1", f"{AXLEARN}: 7B v1 on 512 H100", "--mesh.replica 64 --mesh.data 8", seconds=1.54
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
  Run("v5e:16x16", "fuji_7b_v2", f"{AXLEARN}: 7B v2 on four slices of 256 v5e", seconds=2.21, slices=4),
  Run(
    "v6e:16x16", "fuji_70b_v2", f"{AXLEARN}: 70B v2 on 256 v6e", "--training.gradient-accumulation 4", seconds=19.5
  ),
)  # fmt: skip

prepare_environment(CALIBRATING[0].pod)  # JAX reads it when it is imported

# ruff: noqa: E402
from moejax.planning.plan import Plan, plan

NONE = {"tpu": "none: the mean of the TPUs that have one", "gpu": "none: that of h100"}

PAGE = pathlib.Path(__file__).parent / "step-time.md"

HEAD = """# Is the predicted step time true?

Written by `python docs/step_time.py`. A plan adds up, for the very train step that runs,

- the compiler's own estimate of every operation (on TPU in cycles, over the chip's clock), loops by their trip counts;
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

Where a chip has several runs its efficiency is their geometric mean. Predicted with the efficiency of the others:
{alone}.

## Runs that it is not calibrated on

| topology | experiment, options | published, s | predicted, s | predicted / published |
|---|---|---|---|---|
"""

FOOT = """
{checked}

## Sources

{sources}

Where FLOP/s are published and not the time, the time follows from the FLOPs as MaxText counts them: six a parameter and
token, and attention without its causal half taken off. axlearn keeps the projections of attention and computes the
feed-forward again (on v5e it keeps that too), as `remat="attention"` does here. Mistral and Fuji 70B moved to the host
what they kept of attention, and are planned as if they had not; Mistral in several parts of the batch. Both, Mixtral,
and the 32B on v5e want more memory here than a chip has, and are planned all the same. Mixtral's batch
is that of its recipe, and its slice has the shape that the table names (8x4x4, where it also says 256 chips).

Fuji 7B v1, of 2048 tokens, took longer than v2, of 4096: 2.44 s and 2.21 s on v5e, 2.44 s and 1.78 s on 256 H100. So v1
ran without a fused attention kernel, it seems, while a plan for TPU always has one: that may be why axlearn's runs take
longer than MaxText's of the same chip, by two thirds on v5e. On GPU moejax has no fused attention yet, and a plan
prices the plain attention that runs: a third of the step of v1. MaxText's runs on GPU, which are fused, are left out
for that reason.

For a GPU the compiler writes its own estimate of each operation's time, as it writes cycles for a TPU; products by
cuBLAS are priced at their type's rate, and collectives over NVLink and the network as for TPU. Nothing can be autotuned
without a GPU. A plan for CPU is a roofline.
"""


def main() -> None:
  """Plans every published run and writes the page."""
  with Display("step time") as display:
    found = {run: plan(run.experiment, run.pod, display) for run in (*CALIBRATING, *CHECKING)}
  calibrating = "\n".join(_calibrating_line(run, found[run]) for run in CALIBRATING)
  checked = "\n".join(_checked_line(run, found[run]) for run in CHECKING)
  ratios = [found[run].step_time_s / run.published_s - 1 for run in CHECKING]
  verdict = f"They are off by {min(ratios):+.0%} to {max(ratios):+.0%}; the goal is 20 %."
  sources = "\n".join(f"- {_where(run)}, {run.name}: {run.source}{_rate(run)}" for run in (*CALIBRATING, *CHECKING))
  parts = [HEAD, calibrating, CHECKED.format(chips=_chips(found), alone=_alone(found)), checked, "\n"]
  PAGE.write_text("".join(parts) + FOOT.format(checked=verdict, sources=sources))


def _chips(found: dict[Run, Plan]) -> str:
  lines = []
  for chip in CHIPS.values():
    if chip.platform == "cpu":
      continue
    exact = [_efficiency(run, found[run]) for run in CALIBRATING if run.pod.chip == chip]
    mean = statistics.geometric_mean(exact) if exact else None
    origin = f"{len(exact)} above: {mean:.3f}" if mean else NONE[chip.platform]
    lines.append(f"| {chip.name} | {chip.efficiency:.3f} | {origin} |")
  return "\n".join(lines)


def _alone(found: dict[Run, Plan]) -> str:
  """By how much each run of a chip that has several is off with the efficiency of the others."""
  parts = []
  for run in CALIBRATING:
    others = [_efficiency(other, found[other]) for other in CALIBRATING
              if other != run and other.pod.chip == run.pod.chip]  # fmt: skip
    if others:
      exposed_s = found[run].breakdown_s["collective_exposed"]
      step_s = exposed_s + (_uncalibrated_s(found[run]) - exposed_s) / statistics.geometric_mean(others)
      parts.append(f"{_where(run)}, {run.name} {step_s / run.published_s - 1:+.0%}")
  return "; ".join(parts)


def _uncalibrated_s(found: Plan) -> float:
  exposed_s, step_s = found.breakdown_s["collective_exposed"], found.step_time_s
  return exposed_s + (step_s - exposed_s) * found.topology.chip.efficiency


def _efficiency(run: Run, found: Plan) -> float:
  """With which the prediction would be the published time."""
  exposed_s = found.breakdown_s["collective_exposed"]
  return (_uncalibrated_s(found) - exposed_s) / (run.published_s - exposed_s)


def _where(run: Run) -> str:
  return run.topology if run.slices == 1 else f"{run.slices} slices of {run.topology}"


def _what(run: Run) -> str:
  return f"| {_where(run)} | {run.name}{f' `{run.fields}`' if run.fields else ''} | {run.published_s:.3f} |"


def _calibrating_line(run: Run, found: Plan) -> str:
  step_s = found.step_time_s
  exact = f"{_uncalibrated_s(found):.3f} | {_efficiency(run, found):.3f}"
  return f"{_what(run)} {exact} | {step_s:.3f} | {step_s / run.published_s:.3f} |"


def _checked_line(run: Run, found: Plan) -> str:
  step_s = found.step_time_s
  return f"{_what(run)} {step_s:.3f} | {step_s / run.published_s:.3f} |"


def _rate(run: Run) -> str:
  return "" if run.teraflops is None else f", {run.teraflops:.0f} TFLOP/s a chip"


if __name__ == "__main__":
  main()
