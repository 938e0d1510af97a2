"""Writes docs/pods.md: every scale on its pods, as `moejax plan` predicts it.

`python docs/pods.py` needs `pip install moejax[tpu]` and minutes for each program that is not remembered.
"""

import dataclasses
import pathlib
from typing import Any

from moejax import lookup
from moejax.config.parameters import count
from moejax.display import Display
from moejax.overrides import override
from moejax.planning.topology import parse_topology, prepare_environment

V5P, V5P_512, V6E = (parse_topology(name) for name in ("v5p:4x8x8", "v5p:8x8x8", "v6e:16x16"))
prepare_environment(V5P)  # JAX reads it when it is imported

# ruff: noqa: E402
from moejax.planning.plan import Plan, plan

PAGE = pathlib.Path(__file__).parent / "pods.md"


@dataclasses.dataclass(frozen=True)
class Row:
  """One plan."""

  name: str
  topology: Any
  fields: str = ""
  """Options that differ from the experiment."""
  against: str = ""
  """The dense experiment that it is compared with."""


SCALES = (
  Row("dense_6b4", V5P),
  Row("moe_6b4_64e", V5P, against="dense_6b4"),
  Row("dense_12b6", V5P),
  Row("moe_12b6_64e", V5P, against="dense_12b6"),
  Row("dense_29b6", V5P_512),
  Row("moe_29b6_64e", V5P_512, against="dense_29b6"),
  Row("moe_6b4_16e", V5P, against="dense_6b4"),
  Row("moe_12b6_16e", V5P, against="dense_12b6"),
  Row("moe_29b6_16e", V5P_512, against="dense_29b6"),
  Row("moe_1b6_256e", V5P, against="dense_6b4"),
  Row("moe_6b4_64e", V5P, "--mesh.data 64 --mesh.expert 1 --mesh.model 4 --rules.embed data", against="dense_6b4"),
  Row("mixtral_8x7b", V5P),
  Row("dense_6b4", V6E, "--training.gradient-accumulation 2 --model.remat attention"),
  Row("moe_6b4_64e", V6E, "--training.gradient-accumulation 4 --model.remat attention", against="dense_6b4"),
  Row("dense_12b6", V6E, "--training.gradient-accumulation 4 --model.remat attention"),
  Row("moe_12b6_64e", V6E, "--model.remat layer_inputs", against="dense_12b6"),
  Row(
    "moe_12b6_16e",
    V6E,
    "--rules.embed data --training.gradient-accumulation 4 --model.remat layer_inputs",
    against="dense_12b6",
  ),
  Row(
    "dense_29b6",
    V6E,
    "--mesh.replica 4 --evaluation.batch-size 256 --training.gradient-accumulation 2 --model.remat layer_inputs",
  ),
  Row(
    "moe_29b6_16e",
    V6E,
    "--mesh.data 8 --mesh.model 2 --rules.embed data expert --evaluation.batch-size 256 "
    "--training.gradient-accumulation 4 --model.remat layer_inputs",
    against="dense_29b6",
  ),
)

MAXTEXT = (
  # What MaxText was, its milliseconds of compute and of collectives if all are exposed, its MFU in per cent, and ours.
  (
    "llama2-7b, flash attention, fsdp 256, 16384 tokens a chip", "2930", "73", "51 to 52",
    Row("dense_6b4", V5P),
  ),
  (
    "mixtral-8x7b, dropless, fsdp 32 x expert 8, 4096 tokens a chip", "2016", "70", "34 to 35",
    Row("mixtral_8x7b", V5P),
  ),
  (
    "mixtral-8x7b, twice the balanced capacity, fsdp 32 x expert 8, 4096 tokens a chip", "2847", "411", "22 to 25",
    Row("mixtral_8x7b", V5P, "--model.moe.capacity-factor 2"),
  ),
  (
    "143B (6.6B base, 64 experts), balanced capacity, 8 x 8 x 4, 1024 tokens a chip", "523", "311", "15 to 24",
    Row("moe_6b4_64e", V5P, "--training.batch-size 64 --evaluation.batch-size 64 --model.moe.capacity-factor 1 "
        "--mesh.data 8 --mesh.expert 8 --mesh.model 4 --rules.embed data expert"),
  ),
  (
    "llama2-7b, plain attention, fsdp 64 x tensor 4, 1024 tokens a chip", "290", "33", "30 to 33",
    Row("dense_6b4", V5P, "--training.batch-size 64 --evaluation.batch-size 64 --mesh.replica 1 --mesh.data 64 "
        "--mesh.model 4"),
  ),
)  # fmt: skip

# v6e last: its programs take longest to compile.
ROWS = dict.fromkeys(sorted((*SCALES, *(row for *_, row in MAXTEXT)), key=lambda row: row.topology is V6E))


def main() -> None:
  """Plans every row, those that are remembered at once, and writes the page anew after each."""
  plans: dict[Row, Plan] = {}
  with Display("pods") as display:
    for row in ROWS:
      plans[row] = _plan(row, display)
      display.note(_scale_line(row, plans))
      PAGE.write_text(_page(plans))


def _plan(row: Row, display: Display) -> Plan:
  experiment = override(lookup.find_experiment(row.name), row.fields.split())
  return plan(experiment, row.topology, display)


HEAD = """# The scales on their pods

Written by `python docs/pods.py`: what `moejax plan NAME --topology TOPOLOGY` predicts with the options shown, exposed
collectives included. Nothing is measured; `step-time.md` says how far to trust it. MFU counts the FLOPs of active
parameters, with all choices of a token, also those that a capacity below the balanced load drops (0.625, which GShard
and the paper call 1.25). "Executed" is what the matrix units really do, recomputation and dispatch masks included.

"""

SCALES_HEAD = """
| experiment | topology, options | total / active | mesh | step, s | exposed, s | MFU | executed | GiB | to dense |
|---|---|---|---|---|---|---|---|---|---|
"""

SCALES_FOOT = """

The paper reports an increase under 20 % with 3D sharding (data, expert, model). Here: the same base, top-2, experts as
wide as the dense layer in every second layer. At this capacity an expert layer computes 1.25 rows a token where a dense
one computes 1, which alone is 6 to 8 % of the step. With 16 experts the increase is under 10 % on 6.4B and 29.5B.
Experts on 12.6B (by the formula) and 64 of them on 29.5B (compiled) leave no room for the whole batch at once, and two
parts of it take longer. A row with `--mesh.expert 1` is the same model with 2D sharding. On v6e:16x16, its largest
slice, 64 experts on the base of 29.5B do not fit: 596B parameters with their two moments and gradients take 35 GiB of a
chip's 31. Nor do those on 12.6B, as far as was tried.

How the meshes were chosen: of all that the search ranks by its formula (`moejax plan NAME --search`), on v5p the ones
declared come first or second for each dense model, for 64 experts on 6.4B and 12.6B and for 16 experts (the first for
64 experts on 6.4B does not fit, once compiled); for 64 experts on 29.5B the first, one part of the batch, wants 98.2
GiB, and those with a model axis that the formula puts before ours were not compiled. Dense 12.6B and 29.5B in one part
of the batch take 2.6 % and 5.7 % less than in two (`--training.gradient-accumulation 2`); those MoEs have no room for
that. The rows on v6e were picked by hand, each compilation there taking ten minutes or more, and not tuned alike. """

PEERS_HEAD = """
## What the compiled programs showed, and what changing it gave

Each figure is of the day of its change, with the efficiency and the options of then. Eight experts a chip, whose
weights are gathered over data in every layer, took `moe_6b4_64e` 3.907 s where one a chip took 3.364 s; products of
experts that are kept for the backward pass took it to 2.857 s. 256 shards of a weight are thinner than a tile, and
gathers of them become all-reduces: `dense_6b4` took 2.733 s on them and 2.580 s on 64.

Routers count within each device, and their losses follow from the counts of all
layers at once, where a layer's own sums over all devices made the next one wait; rows are kept for the backward pass
after their exchange and not before it, so that they travel four times and not six; and an expert's rows of all groups
travel in one dimension, where those of one group (20) were padded to a tile and copied on both sides. The first two
took `moe_6b4_64e` from 2.975 s to 2.951 s and 2.873 s, the last took 24 ms of copies off it.

On v6e:16x16 JAX lays data=4 beside expert=64 on chips that are four apart, and four rings share each link. moejax lays
them side by side (`moejax/torus.py`): the same program of `moe_6b4_64e` takes 4.097 s on the one, 3.421 s on the other.

Attention scores never lie in memory: on TPU attention is a fused kernel. The products before and after it write its
layout, and the rotation of positions is a product with a permutation, so that heads are neither copied nor padded:
that took 5.2 % off the step of dense 6.4B (then 32 layers, d_ff 10496). A d_ff that 512 divides fills the tiles of the
matrix units, and its gradients are reduced straight to shards: 10752 takes less time than 10496
(`--model.num-layers 32 --model.d-ff 10752`).

Gathers of weights, sums of gradients and exchanges of tokens go on beside matrix products, by options of the compiler
(`training/compiler.py`): the SparseCores of v5p and v6e carry the first two. Fusions of gathers into products, which
moejax had on all chips before, are refused by libtpu from 0.0.46 on for any but v5e; without them and with SparseCores
`dense_6b4` takes 3.4 % less and `moe_6b4_64e` 2.8 %. Experts' weights are gathered whole, where the compiler by itself
cuts the product into one for each shard: that took `mixtral_8x7b` from 2.361 s to 1.373 s. All gradients of experts are
reduced to shards, where two of three were summed on every chip: `moe_12b6_64e` from 5.689 s to 5.644 s.

Of a sparse layer's rows the backward pass has a copy that nothing else reads, in the layout in which it reads them
(`of_kept` in `models/layers.py`): what JAX keeps of a value that the forward pass uses too is rounded, in a pass over
memory. Groups of 512 tokens have masks half as large as those of 1024. These two took `moe_6b4_64e` from 2.651 s to
2.627 s, and adding to the residual stream within the product that combines took it to 2.619 s. Weights that scale the
experts' hidden units in place of their rows, which would then not be kept, made it 2.737 s: the gradient of the weights
does not fuse with the product before it. Keeping the residual stream after attention in place of what attention adds
made `dense_6b4` 2.398 s from 2.365 s.

The gradients of a gated layer's two inputs are written once (`models/layers.py`), where one of them was computed again
for every tile of the products that take it: 2.0 % of `dense_6b4`, 1.4 % of `moe_6b4_64e`.

Larger tiles, `LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=32768 moejax plan dense_6b4 --topology v5p:4x8x8`, took
dense 6.4B from 2.580 s to 2.166 s, before the last two changes, in twice the compiler's time. They are no default on
v5p, because the published runs that calibrate that chip were without them; on v6e, where public runs have them, they
are.

## Against MaxText, by the same method

MaxText 0.2.5 on 256 v5p, sequence 4096, full remat, by the sum of its compiled programs' cycles, its collectives all
exposed and its cycles not divided by an efficiency, as moejax's are. The models differ by a few per cent in size, so
MFU compares them.

| work | MaxText compute, ms | collectives, ms | MFU, % | moejax | compute, ms | exposed, ms | MFU, % |
|---|---|---|---|---|---|---|---|
"""


def _page(plans: dict[Row, Plan]) -> str:
  scales = [_scale_line(row, plans) for row in SCALES if row in plans]
  peers = [_peer_line(*line, plans) for line in MAXTEXT if line[-1] in plans]
  missing = len(ROWS) - len(plans)
  note = f"\n{missing} of the rows that the command plans are not compiled yet and are left out.\n" if missing else ""
  parts = [HEAD, note, SCALES_HEAD, "\n".join(scales), SCALES_FOOT]
  parts += [PEERS_HEAD, "\n".join(peers), "\n"] if peers else []
  return "".join(parts)


def _scale_line(row: Row, plans: dict[Row, Plan]) -> str:
  found = plans[row]
  where = f"{found.topology.name} {f'`{row.fields}`' if row.fields else ''}".strip()
  counted = count(found.experiment.model)
  sizes = f"{counted.total / 1e9:.1f}B / {counted.active / 1e9:.1f}B"
  mesh = " x ".join(f"{axis} {size}" for axis, size in found.experiment.mesh.shape.items() if size > 1)
  memory = f"{found.hbm_bytes_per_device / 2**30:.1f} of {found.hbm_limit_bytes / 2**30:.1f}"
  if not found.fits:
    return f"| {row.name} | {where} | {sizes} | {mesh} | does not fit | | | | {memory} | |"
  step_s = found.step_time_s
  peak_flops = row.topology.chip.bfloat16_flops
  executed = found.executed_flops_per_device / (step_s * peak_flops)
  dense = next((plans[other] for other in plans if other.name == row.against and other.topology == row.topology), None)
  increase = f"{step_s / dense.step_time_s - 1:+.1%}" if dense and dense.fits else ""
  exposed = found.breakdown_s["collective_exposed"]
  return (
    f"| {row.name} | {where} | {sizes} | {mesh} | {step_s:.3f} | {exposed:.3f} | {found.mfu:.1%} | {executed:.1%} "
    f"| {memory} | {increase} |"
  )


def _peer_line(what: str, compute: str, moved: str, mfu: str, row: Row, plans: dict[Row, Plan]) -> str:
  found, options = plans[row], f"`{row.name} {row.fields}`".replace(" `", "`")
  if not found.fits:
    return f"| {what} | {compute} | {moved} | {mfu} | {options} | does not fit | | |"
  exposed = found.breakdown_s["collective_exposed"]
  own = f"{(found.step_time_s - exposed) * 1e3:.0f} | {exposed * 1e3:.0f} | {found.mfu * 100:.0f}"
  return f"| {what} | {compute} | {moved} | {mfu} | {options} | {own} |"


if __name__ == "__main__":
  main()
