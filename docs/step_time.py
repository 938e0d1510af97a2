"""Writes docs/step-time.md: predicted against published step times.

`python docs/step_time.py` needs `pip install moejax[tpu]` and about a minute for each program that is not remembered.
"""

import pathlib
from typing import Any

from moejax import lookup
from moejax.config.chips import CHIPS
from moejax.display import Display
from moejax.overrides import override
from moejax.planning.topology import parse_topology, prepare_environment

PUBLISHED = (
  # Topology, experiment, options, seconds a step, where it is recorded.
  ("v5p:4x8x8", "fuji_7b_v1", "", 2.85, "axlearn, fuji.py: 7B v1 on tpu-v5p-512 (256 chips)"),
  (
    "v4:8x8x8", "fuji_7b_v1", "--mesh.replica 32 --mesh.data 16", 3.03,
    "axlearn, fuji.py: 7B v1 on tpu-v4-1024 (512 chips)",
  ),
)  # fmt: skip

TOPOLOGIES = [parse_topology(name) for name, *_ in PUBLISHED]
prepare_environment(TOPOLOGIES[0])  # JAX reads it when it is imported

# ruff: noqa: E402
from moejax.planning.plan import plan

PAGE = pathlib.Path(__file__).parent / "step-time.md"

HEAD = """# Is the predicted step time true?

Written by `python docs/step_time.py`. A plan adds up, for the very train step that runs,

- the compiler's own cycle estimate of every operation, loops by their trip counts, over the chip's clock;
- kernels, which the compiler does not see into, by a roofline: their products at peak, then their vector operations,
  or their bytes where those take longer;
- copies and collectives, as far as nothing goes on beside them: bytes over the rate of the links that their mesh axis
  has in the torus (`moejax/planning/collectives.py`); a collective that everything waits for shares the links with
  those under way and does not queue behind them, which is an assumption that no measured run here tells from the other;

and divides all but the exposed collectives by one efficiency of the chip, its only calibrated number
(`moejax/config/chips.py`). What it knows nothing of: input, checkpoints, stragglers, throttling.

## The runs that it is calibrated on

| topology | experiment, options | published, s | uncalibrated, s | efficiency | predicted, s | predicted / published |
|---|---|---|---|---|---|---|
"""

FOOT = """
{sources}
axlearn keeps the projections of attention and computes the feed-forward again, as `remat="attention"` does here.

| chip | efficiency | from |
|---|---|---|
{chips}

GPU and CPU have no cycle estimates: their plans are rooflines of the program that XLA makes for CPU, a lower bound.
"""


def main() -> None:
  """Plans every published run and writes the page."""
  with Display("step time") as display:
    lines = [_line(plan(_experiment(name, fields), topology, display), fields, seconds)
             for topology, (_, name, fields, seconds, _) in zip(TOPOLOGIES, PUBLISHED, strict=True)]  # fmt: skip
  sources = "\n".join(f"- {topology}: {source}" for topology, *_, source in PUBLISHED) + "\n"
  calibrated = {topology.chip.name for topology in TOPOLOGIES}
  origin = {True: "the run above", False: "none: the mean of those that have one"}
  chips = "\n".join(
    f"| {chip.name} | {chip.efficiency:.3f} | {origin[chip.name in calibrated]} |"
    for chip in CHIPS.values()
    if chip.platform == "tpu"
  )
  PAGE.write_text(HEAD + "\n".join(lines) + "\n" + FOOT.format(sources=sources, chips=chips))


def _experiment(name: str, fields: str) -> Any:
  return override(lookup.find_experiment(name), fields.split())


def _line(found: dict[str, Any], fields: str, published_s: float) -> str:
  exposed_s, step_s = found["breakdown_s"]["collective_exposed"], found["step_time_s"]
  chip = parse_topology(found["topology"]).chip
  uncalibrated_s = exposed_s + (step_s - exposed_s) * chip.efficiency
  exact = (uncalibrated_s - exposed_s) / (published_s - exposed_s)
  options = f" `{fields}`" if fields else ""
  return (
    f"| {found['topology']} | {found['experiment']}{options} | {published_s} | {uncalibrated_s:.3f} | {exact:.3f} | "
    f"{step_s:.3f} | {step_s / published_s:.3f} |"
  )


if __name__ == "__main__":
  main()
