"""Writes docs/step-time.md: predicted against published step times.

`python docs/step_time.py` needs `pip install moejax[tpu,gpu-plan]` and minutes for each program that is not cached.
With `--only gpu` or `--only tpu` it plans the runs of that platform, and the others keep what the page says of them.
"""

import argparse
import dataclasses
import pathlib
import re
import statistics
import sys
from typing import Any

from moejax import lookup
from moejax.config.chips import CHIPS, Chip
from moejax.config.parameters import flops_per_token, tokens_per_step
from moejax.display import Display
from moejax.overrides import override
from moejax.planning.topology import Topology, parse_topology, prepare_environment

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from published_rows import kernels_as_published, ran_plain_attention


@dataclasses.dataclass(frozen=True)
class Run:
  """A published step time."""

  topology: str
  name: str
  source: str
  fields: str = ""
  """Options that differ from the experiment."""
  seconds: float | None = None
  teraflops: float | None = None
  """TFLOP/s per chip, if they are published instead of the time."""
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
MAXTEXT_22B = (
  "--model.num-layers 48 --model.d-model 6144 --model.num-heads 24 --model.num-kv-heads 24 --model.head-dim 256 "
  "--model.d-ff 24576 --model.activation gelu --training.batch-size 832 --evaluation.batch-size 832 --mesh.data 64"
)
RECIPES = "tpu-recipes, training/trillium"
MAXTEXT_A3 = "MaxText, configs/gpu/a3"
LLAMA_7B = "--model.vocab-size 32000 --model.tie-embeddings False --model.remat dots"
LLAMA_70B = (
  "--model.vocab-size 128256 --data.sequence-length 8192 --training.batch-size 512 --evaluation.batch-size 512 "
  "--mesh.replica 2 --mesh.data 128"
)

CALIBRATING = (
  Run("v5p:4x8x8", "fuji_7b_v1", f"{AXLEARN}: 7B v1 on 256 v5p", seconds=2.85),
  Run(
    "v5p:4x4x4", "maxtext_32b", f"{MAXTEXT_V5P}: 32B on v5p-128 (64 chips)",
    f"--training.batch-size 448 --evaluation.batch-size 64 {TENSOR}", teraflops=328,
  ),
  Run("v4:4x4x4", "maxtext_16b", "MaxText, configs/v4/README.md: 22B on 64 chips", MAXTEXT_22B, teraflops=156),
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
    "gpu:h100:8", "fuji_7b_v2", f"{MAXTEXT_A3}: Llama 2 7B on 8 H100",
    f"{LLAMA_7B} --training.batch-size 32 --evaluation.batch-size 32 --mesh.replica 1 --mesh.data 8", seconds=1.535,
  ),
  Run(
    "gpu:h100:16", "fuji_7b_v2", f"{MAXTEXT_A3}: Llama 2 7B on 16 H100",
    f"{LLAMA_7B} --training.batch-size 64 --evaluation.batch-size 64 --mesh.replica 2 --mesh.data 8", seconds=1.789,
  ),
  Run(
    "gpu:h200:256", "fuji_70b_v2", "MaxText, gpu-recipes, a3ultra: Llama 3.1 70B on 256 H200", LLAMA_70B,
    seconds=15.516,
  ),
)  # fmt: skip

CHECKING = (
  Run(
    "v4:8x8x8", "fuji_7b_v1", f"{AXLEARN}: 7B v1 on 512 v4",
    "--mesh.replica 32 --mesh.data 16", seconds=3.03,
  ),
  Run(
    "v5p:4x4x4", "maxtext_64b", f"{MAXTEXT_V5P}: 64B on v5p-128 (64 chips)",
    f"--training.batch-size 192 --evaluation.batch-size 64 {TENSOR}", teraflops=323,
  ),
  Run(
    "v5p:4x4x8", "mixtral_8x7b",
    "MaxText, docs/reference/models/tiering.md: Mixtral 8x7B, 2,909 tokens per second and chip",
    "--training.batch-size 4608 --evaluation.batch-size 128 --mesh.data 128 --mesh.expert 1 "
    "--model.moe.dispatch grouped --model.remat layer_inputs", seconds=36 * 4096 / 2909,
  ),
  Run("v5e:16x16", "fuji_7b_v2", f"{AXLEARN}: 7B v2 on four slices of 256 v5e", seconds=2.21, slices=4),
  Run(
    "v6e:16x16", "fuji_70b_v2", f"{AXLEARN}: 70B v2 on 256 v6e", "--training.gradient-accumulation 4", seconds=19.5
  ),
  Run(
    "gpu:h100:256", "fuji_7b_v1", f"{AXLEARN}: 7B v1 on 256 H100", "--mesh.replica 32 --mesh.data 8", seconds=2.44
  ),
  Run(
    "gpu:h100:512", "fuji_7b_v1", f"{AXLEARN}: 7B v1 on 512 H100", "--mesh.replica 64 --mesh.data 8", seconds=1.54
  ),
  Run(
    "gpu:h100:256", "fuji_7b_v2", f"{AXLEARN}: 7B v2 on 256 H100", "--mesh.replica 32 --mesh.data 8", seconds=1.78
  ),
  Run(
    "gpu:h100:512", "fuji_70b_v2", f"{AXLEARN}: 70B v2 on 512 H100", "--mesh.replica 4 --mesh.data 128", seconds=12.9
  ),
)  # fmt: skip

prepare_environment(CALIBRATING[0].pod)  # JAX reads it when it is imported

# ruff: noqa: E402
from moejax.planning.plan import Plan, plan

PAGE = pathlib.Path(__file__).parent / "step-time.md"

HEAD = """# Predicted against published step times

`python docs/step_time.py` writes this page. A plan is for the very training step that moejax runs, and adds up:

- the compiler's estimate of every operation (on TPU, cycles divided by the clock rate), times the trip counts of loops;
- kernels, which the compiler treats as opaque, by a roofline: their matrix products at the peak rate plus their vector
  operations, or their bytes if those take longer;
- copies and collectives, except where they overlap with computation. A collective takes its bytes divided by the
  bandwidth of the links of its mesh axis in the torus (`moejax/planning/collectives.py`). Collectives that run at the
  same time along one dimension of the torus share its links evenly (`moejax/planning/links.py`). This is an assumption;
  the runs below do not distinguish it from a queue.

Everything except the exposed collectives is then divided by the efficiency of the chip, which is the only calibrated
parameter (`moejax/config/chips.py`). A plan does not include input, checkpoints, stragglers and throttling.

Other frameworks ran these models, with programs that differ from moejax's in the attention kernel and in what they save
for the backward pass. The efficiency therefore includes differences between frameworks.

## Runs used for calibration

| topology | experiment, options | published, s | uncalibrated, s | efficiency | predicted, s | predicted / published |
|---|---|---|---|---|---|---|
"""

CHECKED = """

| chip | efficiency | from |
|---|---|---|
{chips}

The efficiency of a chip with several runs is their geometric mean. The errors of each of these runs, predicted with the
efficiency of the others:
{alone}.

## Runs not used for calibration

| topology | experiment, options | published, s | predicted, s | predicted / published |
|---|---|---|---|---|
"""

FOOT = """
{checked}

## Sources

{sources}

If FLOP/s are published instead of the time, the time follows from the FLOPs as MaxText counts them: six per parameter
and token, and attention including its masked half. axlearn saves the attention projections and recomputes the
feed-forward layers (on v5e it saves those too), as `remat="attention"` does here. Mistral and, on v6e, Fuji 70B
offloaded the saved values of attention to the host. Their plans do not offload; that of Mistral uses gradient
accumulation instead. These two, Mixtral, and 32B on v5e need more memory here than the chip has, and are planned
nevertheless. The batch size of Mixtral is that of its recipe, and the slice is the shape that the table names (8x4x4,
although it also says 256 chips). The shape of MaxText 22B has 22.1B parameters with two matrices in a feed-forward
layer, as planned here, and would have 29.4B with three. Llama 2 7B is planned as Fuji 7B with the vocabulary of Llama
and embeddings of its own, and Llama 3.1 70B as Fuji 70B with that of Llama.

axlearn does not say which of its runs had a fused attention kernel. Fuji 7B v1, with sequence length 2048, took longer
than v2, with 4096: 2.44 s and 2.21 s on v5e, 2.44 s and 1.78 s on 256 H100. With plain attention, the program of v2
would compute for 2.4 s on 256 H100 even at an efficiency of 1, so v2 had a fused kernel; its efficiency is then 0.75.
That of v1 is 0.74 with plain attention, as if it had none, and 0.51 with a fused kernel. On GPU, v1 is therefore
planned with plain attention and v2 with a fused kernel. A plan for TPU always has one, which may explain why v1 takes
longer than runs of MaxText on the same chip, by two thirds on v5e. Since the attention of these runs is inferred from
their times, they are compared on GPU, as v1 is on v4, and not used for calibration. Fuji 70B v2 on 512 H100 took as
long as with plain attention (an efficiency of 0.77, against 0.50 with a fused kernel); since its weights are gathered
over 16 nodes, there may be other causes.

The runs of MaxText on GPU had the fused attention of cuDNN, and calibrate H100 and H200. Their plans, and those of
Fuji v2, price moejax's kernel at the rate of cuDNN's (55 % of peak). Other plans for GPU price it at the rate of Triton
kernels of attention (38 % of peak). H100 and H200 have one efficiency: the matrix units are the same, a plan knows the
memory of each, and the two runs on H100 differ more from each other than from the run on H200.

No run calibrates tpu7x. Its efficiency is that of published products: of matrices 2048 and 4096 wide they reach 679 and
893 TFLOP/s, for which the compiler estimates 755 and 1,029 TFLOP/s, efficiencies of 0.90 and 0.87, whose geometric mean
is 0.884.

For GPU, the compiler writes its own estimate of the time of each operation, as it writes cycles for TPU. cuBLAS
products, grouped products and attention are computed from the rates that they reach, other kernels from their bytes,
and collectives over NVLink and the network as for TPU. Autotuning is not available without a GPU. A plan for CPU is a
roofline.
"""


def main() -> None:
  """Plans the published runs, all or those of one platform, and writes the page."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", choices=("gpu", "tpu"), help="plan the runs of this platform and keep the other lines")
  only = parser.parse_args().only
  with Display("step time") as display:
    chosen = (run for run in (*CALIBRATING, *CHECKING) if only in (None, run.pod.chip.platform))
    PAGE.write_text(page_of({run: planned(run, display) for run in chosen}, PAGE.read_text()))


def page_of(found: dict[Run, Plan], before: str) -> str:
  """The page with these plans. Runs of platforms without plans keep what the page before says of them."""
  platforms = {run.pod.chip.platform for run in found}
  chips = [chip for chip in CHIPS.values() if chip.platform != "cpu"]
  calibrating = [
    _calibrating_line(run, found[run]) if run in found else kept(before, _what(run)) for run in CALIBRATING
  ]
  of_chips = [
    _chip_line(chip, found) if chip.platform in platforms else kept(before, _chip_start(chip)) for chip in chips
  ]
  alone = [_alone(run, found) if run in found else _kept_alone(before, run) for run in CALIBRATING]
  checked = [_checked_line(run, found[run]) if run in found else kept(before, _what(run)) for run in CHECKING]
  ratios = [float(line.strip("| ").rpartition("|")[2]) - 1 for line in checked]
  verdict = f"The errors are between {min(ratios):+.0%} and {max(ratios):+.0%}; the goal is 20 %."
  sources = "\n".join(f"- {_where(run)}, {run.name}: {run.source}{_rate(run)}" for run in (*CALIBRATING, *CHECKING))
  between = CHECKED.format(chips="\n".join(of_chips), alone="; ".join(filter(None, alone)))
  parts = [HEAD, "\n".join(calibrating), between, "\n".join(checked), "\n"]
  return "".join(parts) + FOOT.format(checked=verdict, sources=sources)


def kept(page: str, start: str) -> str:
  """The line of the page that starts so.

  Raises:
    SystemExit: If there is none.
  """
  line = next((line for line in page.splitlines() if line.startswith(start)), None)
  if line is None:
    raise SystemExit(f"{PAGE.name} has no line that starts with {start}; run without --only")
  return line


def _kept_alone(page: str, run: Run) -> str:
  found = re.search(rf"{re.escape(f'{_where(run)}, {run.name}')} [+-]\d+%", page)
  return found[0] if found else ""


def planned(run: Run, display: Display) -> Plan:
  """The plan of a published run, with the kernels of its framework."""
  experiment = run.experiment
  with kernels_as_published(ran_plain_attention(run.source, experiment, run.pod)):
    return plan(experiment, run.pod, display)


def _chip_start(chip: Chip) -> str:
  return f"| {chip.name} | {chip.efficiency:.3f} |"


def _chip_line(chip: Chip, found: dict[Run, Plan]) -> str:
  chips = " and ".join(chip.runs_are_of)
  if chip.name in chip.runs_are_of:
    exact = [_efficiency(run, found[run]) for run in CALIBRATING if run.pod.chip.name in chip.runs_are_of]
    where = "" if chips == chip.name else f", on {chips}"
    origin = f"{len(exact)} above{where}: {statistics.geometric_mean(exact):.3f}"
  else:
    origin = f"none: the value of {chips}" if chip.platform == "gpu" else "none: published products (below)"
  return f"{_chip_start(chip)} {origin} |"


def _alone(run: Run, found: dict[Run, Plan]) -> str:
  """The error of a run with the efficiency of the others that its chip is calibrated with. Empty without others."""
  others = [_efficiency(other, found[other]) for other in CALIBRATING
            if other != run and other.pod.chip.name in run.pod.chip.runs_are_of]  # fmt: skip
  if not others:
    return ""
  exposed_s = found[run].breakdown_s["collective_exposed"]
  step_s = exposed_s + (_uncalibrated_s(found[run]) - exposed_s) / statistics.geometric_mean(others)
  return f"{_where(run)}, {run.name} {step_s / run.published_s - 1:+.0%}"


def _uncalibrated_s(found: Plan) -> float:
  exposed_s, step_s = found.breakdown_s["collective_exposed"], found.step_time_s
  return exposed_s + (step_s - exposed_s) * found.topology.chip.efficiency


def _efficiency(run: Run, found: Plan) -> float:
  """The efficiency for which the prediction equals the published time."""
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
  return "" if run.teraflops is None else f", {run.teraflops:.0f} TFLOP/s per chip"


if __name__ == "__main__":
  main()
