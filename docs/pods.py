"""Writes docs/pods.md: large models on their topologies, as `moejax plan` predicts them.

`python docs/pods.py` needs `pip install moejax[tpu,gpu-plan]` and minutes for each program that is not cached. With
`--only gpu` or `--only tpu` it plans the rows of that platform, and the others keep their lines. `python docs/pods.py
--mfu` compiles nothing: it computes the MFU from the step times that the page has.
"""

import argparse
import dataclasses
import datetime
import pathlib
import re
from importlib import metadata
from typing import Any

from moejax import lookup
from moejax.config.model import Model
from moejax.config.parameters import flops_per_token, parameter_counts
from moejax.display import Display
from moejax.overrides import override
from moejax.planning.estimate import estimate
from moejax.planning.meshes import on_topology
from moejax.planning.topology import parse_topology, prepare_environment

V5P, V5P_512, V6E, H100, H100_512 = (
  parse_topology(name) for name in ("v5p:4x8x8", "v5p:8x8x8", "v6e:16x16", "gpu:h100:256", "gpu:h100:512")
)
prepare_environment(V5P)  # JAX reads it when it is imported

# ruff: noqa: E402
from moejax.planning.plan import Plan, model_flops_per_step, plan

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

EARLIER = SCALES[-4:-3]
"""Rows whose programs were compiled before 2026-11-27 and not since. Their memory is not compared with the formula: the
other programs that were compiled again need up to a quarter less than before."""

SEARCHED = (
  Row("dense_6b4", H100),
  Row("moe_6b4_16e", H100, "--mesh.data 8 --mesh.model 2", against="dense_6b4"),
  Row("moe_6b4_64e", H100, against="dense_6b4"),
  Row("dense_12b6", H100, "--mesh.replica 32 --mesh.data 8 --training.gradient-accumulation 2"),
  Row("moe_12b6_16e", H100, "--mesh.data 4 --mesh.model 4 --rules.embed data expert", against="dense_12b6"),
  Row("moe_12b6_64e", H100, "--mesh.data 2 --mesh.model 2", against="dense_12b6"),
  Row("dense_29b6", H100_512, "--mesh.replica 4 --mesh.model 2"),
  Row("moe_29b6_64e", H100_512, "--mesh.data 2 --mesh.model 4", against="dense_29b6"),
  Row(
    "moe_29b6_16e",
    H100_512,
    "--mesh.replica 4 --mesh.data 2 --mesh.model 4 --rules.embed data expert --training.gradient-accumulation 2",
    against="dense_29b6",
  ),
)
"""The configurations that a search found."""

SEQUENCE = 4096

LLAMA2_7B = Model(
  num_layers=32, d_model=4096, num_heads=32, num_kv_heads=32, head_dim=128, d_ff=11008, vocab_size=32_000
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Peer:
  """A program of MaxText beside one of moejax."""

  what: str
  model: Model
  """Its FLOPs count as those of moejax; the 143B model is close to that of `moe_6b4_64e`."""
  tokens: int
  """Of one chip."""
  compute_s: float
  collectives_s: float
  """All of them, as if nothing hid them."""
  row: Row

  @property
  def mfu(self) -> str:
    """In per cent, from all collectives exposed to all hidden."""
    peak = self.row.topology.chip.bfloat16_flops
    least_s = self.tokens * flops_per_token(self.model, SEQUENCE) / peak
    return f"{least_s / (self.compute_s + self.collectives_s) * 100:.0f} to {least_s / self.compute_s * 100:.0f}"


MIXTRAL, SPARSE = (lookup.find_experiment(name).model for name in ("mixtral_8x7b", "moe_6b4_64e"))

MAXTEXT = (
  Peer(
    "llama2-7b, flash attention, fsdp 256, 16384 tokens per chip", LLAMA2_7B, 16_384, 2.930, 0.073,
    Row("dense_6b4", V5P),
  ),
  Peer(
    "mixtral-8x7b, dropless, fsdp 32 x expert 8, 4096 tokens per chip", MIXTRAL, 4096, 2.016, 0.070,
    Row("mixtral_8x7b", V5P),
  ),
  Peer(
    "mixtral-8x7b, twice the balanced capacity, fsdp 32 x expert 8, 4096 tokens per chip", MIXTRAL, 4096, 2.847, 0.411,
    Row("mixtral_8x7b", V5P, "--model.moe.capacity-factor 2"),
  ),
  Peer(
    "143B (6.6B base, 64 experts), balanced capacity, 8 x 8 x 4, 1024 tokens per chip", SPARSE, 1024, 0.523, 0.311,
    Row("moe_6b4_64e", V5P, "--training.batch-size 64 --evaluation.batch-size 64 --model.moe.capacity-factor 1 "
        "--mesh.data 8 --mesh.expert 8 --mesh.model 4 --rules.embed data expert"),
  ),
  Peer(
    "llama2-7b, plain attention, fsdp 64 x tensor 4, 1024 tokens per chip", LLAMA2_7B, 1024, 0.290, 0.033,
    Row("dense_6b4", V5P, "--training.batch-size 64 --evaluation.batch-size 64 --mesh.replica 1 --mesh.data 64 "
        "--mesh.model 4"),
  ),
)  # fmt: skip

# v6e last: its programs take longest to compile.
ROWS = dict.fromkeys(sorted((*SEARCHED, *SCALES, *(peer.row for peer in MAXTEXT)), key=lambda row: row.topology is V6E))
COMPILERS = {"tpu": "libtpu", "gpu": "jax-cuda12-pjrt"}


def main() -> None:
  """Plans the rows, all or those of one platform, and rewrites the page after each; cached plans take no time."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--mfu", action="store_true", help="only compute the MFU from the step times on the page")
  parser.add_argument("--memory", action="store_true", help="only compare the memory on the page with the formula")
  parser.add_argument("--only", choices=COMPILERS, help="plan the rows of this platform and keep the other lines")
  known = parser.parse_args()
  if known.memory:
    for row, ratio in memory_by_formula(PAGE.read_text()).items():
      print(f"{row.name:16} {_where(row):.100}  {ratio - 1:+.0%}")
    return
  if known.mfu:
    PAGE.write_text(with_mfu(PAGE.read_text()))
    return
  before = PAGE.read_text() if known.only else ""
  plans: dict[Row, Plan] = {}
  with Display("pods") as display:
    for row in (row for row in ROWS if known.only in (None, row.topology.chip.platform)):
      plans[row] = _plan(row, display)
      display.note(_scale_line(row, plans))
      PAGE.write_text(_page(plans, before))


def _compiled_now(compiler: str) -> str:
  versions = " and ".join(f"{name} {metadata.version(name)}" for name in ("jax", compiler))
  return f"Compiled until {datetime.date.today()} with {versions}."


def _compiled_before(page: str, compiler: str) -> str:
  found = re.search(rf"^Compiled until .* {compiler} .*", page, re.MULTILINE)
  return found[0] if found else ""


def with_mfu(page: str) -> str:
  """The page with its text and its MFU as this file has them, and its step times, memory and executed FLOPs as they
  are."""
  cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
  lines: dict[Row, str] = {}
  peers = []
  for row in (*SCALES, *SEARCHED):
    (found,) = [line for line in cells if line[:2] == [row.name, _where(row)]]
    if found[4] != "does not fit":
      found[6] = f"{_mfu(row, float(found[4])):.1%}"
    lines[row] = f"| {' | '.join(found)} |"
  for peer in MAXTEXT:
    (found,) = [line for line in cells if line[0] == peer.what]
    seconds = (float(found[5]) + float(found[6])) / 1e3
    peers.append(_peer_line(peer, [*found[5:7], f"{_mfu(peer.row, seconds) * 100:.0f}"]))
  compiled = {platform: _compiled_before(page, compiler) for platform, compiler in COMPILERS.items()}
  return _page_of(lines, peers, compiled)


def memory_by_formula(page: str) -> dict[Row, float]:
  """Memory by the formula of each row, relative to that of its program on the page."""
  cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
  found = {}
  for row in SCALES:
    (size,) = [float(line[8].split()[0]) for line in cells if line[:2] == [row.name, _where(row)]]
    experiment = on_topology(_experiment(row), row.topology)
    found[row] = estimate(experiment, row.topology).memory_bytes / 2**30 / size
  return found


def _mfu(row: Row, step_s: float) -> float:
  experiment = on_topology(_experiment(row), row.topology)
  return model_flops_per_step(experiment) / (step_s * row.topology.devices * row.topology.chip.bfloat16_flops)


def _experiment(row: Row) -> Any:
  return override(lookup.find_experiment(row.name), ["--model.gradient-dtype", "compute", *row.fields.split()])


def _plan(row: Row, display: Display) -> Plan:
  return plan(_experiment(row), row.topology, display)


HEAD = """# Large models on their topologies

`python docs/pods.py` writes this page. Each row is what `moejax plan NAME --topology TOPOLOGY` predicts with the given
options, including exposed collectives. Nothing here is measured; `step-time.md` shows how accurate the predictions are.
MFU counts the FLOPs of the choices that experts accept at the balanced load: not those that a capacity below it drops
(a capacity factor of 0.625, which is 1.25 in the definition of GShard and the paper, accepts five of eight choices),
nor padding or recomputation. Attention counts in full, without taking the causal half off. "Executed" counts what the
matrix units compute, including recomputation and dispatch masks. Gradients are computed and summed in bfloat16: every
row has `--model.gradient-dtype compute` in addition to the given options. `python docs/pods.py --mfu` computes the MFU
from the step times on this page, without compiling, and `--memory` compares the memory with that of the formula.

"""

SCALES_HEAD = """
| experiment | topology, options | total / active | mesh | step, s | exposed, s | MFU | executed | GiB | to dense |
|---|---|---|---|---|---|---|---|---|---|
"""

SCALES_FOOT = """

The paper reports an increase of the step time below 20 % with 3D sharding (data, expert, model). The models here have
the same base, top-2 routing, and experts as wide as the dense layer in every second layer. At this capacity, an expert
layer computes 1.25 rows per token where a dense layer computes 1, which alone is 6 to 8 % of the step. With 16 experts,
the increase is below 10 % for 6.4B and 29.5B. With experts on 12.6B, the whole batch does not fit in memory on the
declared mesh (according to the formula), and two microbatches take longer. With 64 experts on 29.5B it fits and takes
longer than two microbatches (6.263 s). A row with `--mesh.expert 1` is the same model with 2D sharding. On v6e:16x16,
its largest slice, 64 experts on the 29.5B base do not fit: 596B parameters with two moments and gradients take 35 GiB
of the 31 GiB per chip. The row of 64 experts on 12.6B on v6e was compiled before 2026-11-27 and not since. The three
rows after it need 23 to 28 % less memory than their programs of then, and by formula this one would fit (29.3 GiB); no
program shows it.

On v5p, a search was run for each scale (`moejax plan NAME --topology TOPOLOGY --search --tries 4 --model.gradient-dtype
compute`): of all valid meshes, policies of rematerialization and numbers of microbatches, it compiles the four that its
formula ranks first. The declared configuration is the fastest of them for the three dense models, of which the next
takes 0.2 to 0.6 % longer, for 64 experts on 6.4B and 12.6B and for 16 experts on 29.5B, of which the next takes 7 to 9
% longer or does not fit. In the other three cases the declared configuration was not among the four and is faster than
what was found: 2.601 s for 16 experts on 6.4B (`--rules.embed data`), 6.114 s for 16 experts on 12.6B (`--mesh.data 64
--mesh.expert 4 --rules.embed data --training.gradient-accumulation 1`) and 5.966 s for 64 experts on 29.5B
(`--mesh.data 4 --mesh.model 2 --training.gradient-accumulation 1`). In the last two, the formula ranks whole batches
above two microbatches. Dense 12.6B and 29.5B take 2.6 % and 5.7 % less time without gradient accumulation than with
`--training.gradient-accumulation 2`.

On v6e, where a compilation takes 3 to 20 minutes, two searches with `--tries 2` were run. Neither found a faster
configuration than that of the table, which was chosen by hand: of `dense_6b4` 1.771 s (`--mesh.replica 8 --mesh.data 32
--training.gradient-accumulation 2`), since the formula takes saving more to be faster than recomputing it, and of
`moe_29b6_16e` 11.66 s (`--mesh.data 4 --mesh.model 4 --rules.embed data expert --training.gradient-accumulation 8`).
The options of the other rows on v6e were not tuned equally well.
"""

SEARCHED_HEAD = """
## On H100

A search chose the options of these rows (`moejax plan NAME --topology TOPOLOGY --search --tries 4`): of all valid
meshes, policies of rematerialization and numbers of microbatches, it compiles those that its formula ranks first. For
each dense model and each with 16 experts, four to six configurations were compiled in two searches, between which the
memory of the formula was corrected, and the row is the fastest one that fits. Of those of `dense_12b6` and
`moe_29b6_16e`, one fits, and four need up to 8 % more memory than there is. With 64 experts, one search compiled four
configurations for each base: all fit on 6.4B, three on 12.6B and two on 29.5B, and the next best takes 1 to 4 % longer.
Since the other searches, XLA schedules for all memory of the GPU, for which the rows but not the searches were run
again. Eight GPUs share a switch of 450 GB/s, and nodes are connected by a network of 50 GB/s per GPU, so that the
exchange of tokens and the sums of gradients take more of the step than on v5p. The attention kernel for GPU skips the
blocks above the diagonal, which MFU counts and "executed" does not.

"""

PEERS_HEAD = """
## What determines the step time

**Sharding of experts.** One expert per chip is faster than eight: the weights of eight experts have to be gathered over
the data axis in every layer. The compiler reduces gradients over all chips of a slice by an all-reduce and over fewer
chips by a reduce-scatter, which takes half the time, so that 64 shards are faster than 256. (An option keeps gathers
over a whole slice from becoming all-reduces too.) Expert weights are gathered as a whole, where the compiler would
otherwise split the product into one for each shard. The gradients of all expert weights are reduced to shards.

**Routing.** Routers count within each device. Their losses are computed from the counts of all layers at once, so that
no layer waits for a sum over devices. The rows of a sparse layer are saved for the backward pass after the exchange,
not before it, so they are exchanged four times instead of six. The rows of all groups form one dimension of an expert's
input; the rows of a single group would be padded to a tile. Groups of 512 tokens have masks half as large as groups of
1024.

**Rematerialization.** The backward pass reads its own copy of the rows of a sparse layer, in the layout that it needs
(`of_kept` in `models/remat.py`): JAX rounds a saved value that the forward pass uses too, in another pass over memory.
The gradients of the two inputs of a gated layer are written once; otherwise one of them would be recomputed for every
tile of the products that use it.

**Attention.** On TPU, attention is a fused kernel, and its scores are never written to memory. The matrix products
before and after it use its layout, and the rotary embedding is a product with a permutation, so heads are neither
copied nor padded.

**Shapes.** A `d_ff` that is divisible by 512 fills the tiles of the matrix units, and its gradients are reduced
directly to shards: a width of 10752 takes less time than 10496.

**Placement.** On v6e:16x16, the default device order of JAX for data=4 and expert=64 makes four rings share each link.
moejax places the devices of an axis next to each other (`moejax/torus.py`): `moe_6b4_64e` takes 3.421 s per step
instead of 4.097 s.

**Overlap.** Compiler options (`training/compiler.py`) overlap gathers of weights, sums of gradients and exchanges of
tokens with matrix products. On v5p and v6e, the SparseCores execute the first two.

**Tile size.** `LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=32768` enables larger tiles, which reduces the step
time on v5p and doubles the compilation time. Larger tiles are the default on v6e and tpu7x, where published runs use
them. They are not the default on v5p, because the published runs that calibrate that chip did not use them.

## Comparison with MaxText, by the same method

MaxText 0.2.5 on 256 v5p chips, with sequence length 4096 and full rematerialization. Its compute time is the sum of the
cycles of its compiled programs, not divided by an efficiency, and all its collectives count as exposed. The compute
time of moejax is not divided by an efficiency either, and its collectives are those that computation does not hide. The
models differ in size by a few per cent, so MFU is what to compare. It is defined as above for both; of MaxText it is a
range, from all collectives exposed to all hidden. `mixtral_8x7b` has the balanced capacity, where MaxText's first
Mixtral is dropless.

| work | MaxText compute, ms | collectives, ms | MFU, % | moejax | compute, ms | exposed, ms | MFU, % |
|---|---|---|---|---|---|---|---|
"""


def _page(plans: dict[Row, Plan], before: str) -> str:
  """The page with these plans. Other rows keep their lines on the page before."""
  lines = {row: _scale_line(row, plans) for row in plans}
  for row in (row for row in (*SCALES, *SEARCHED) if row not in plans):
    if line := _starting(before, f"| {row.name} | {_where(row)} |"):
      lines[row] = line
  peers = [
    _peer_line(peer, _peer_cells(plans[peer.row])) if peer.row in plans else _starting(before, f"| {peer.what} |")
    for peer in MAXTEXT
  ]
  platforms = {row.topology.chip.platform for row in plans}
  compiled = {
    platform: _compiled_now(compiler) if platform in platforms else _compiled_before(before, compiler)
    for platform, compiler in COMPILERS.items()
  }
  return _page_of(lines, list(filter(None, peers)), compiled)


def _starting(page: str, start: str) -> str:
  return next((line for line in page.splitlines() if line.startswith(start)), "")


def _page_of(lines: dict[Row, str], peers: list[str], compiled: dict[str, str]) -> str:
  scales, searched = ([lines[row] for row in rows if row in lines] for rows in (SCALES, SEARCHED))
  missing = len(SCALES) + len(SEARCHED) + len(MAXTEXT) - len(scales) - len(searched) - len(peers)
  note = f"\n{missing} of the rows that the command plans are not compiled yet and are left out.\n" if missing else ""
  parts = [HEAD, compiled["tpu"], "\n", note, SCALES_HEAD, "\n".join(scales), SCALES_FOOT]
  parts += [SEARCHED_HEAD, compiled["gpu"], "\n", SCALES_HEAD, "\n".join(searched), "\n"] if searched else []
  parts += [PEERS_HEAD, "\n".join(peers), "\n"] if peers else []
  return "".join(parts)


def _where(row: Row) -> str:
  return f"{row.topology.name} {f'`{row.fields}`' if row.fields else ''}".strip()


def _scale_line(row: Row, plans: dict[Row, Plan]) -> str:
  found = plans[row]
  where = _where(row)
  counted = parameter_counts(found.experiment.model)
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


def _peer_cells(found: Plan) -> list[str]:
  """Milliseconds of compute and of exposed collectives, and MFU in per cent."""
  if not found.fits:
    return ["does not fit", "", ""]
  exposed_s = found.breakdown_s["collective_exposed"]
  compute_s = (found.step_time_s - exposed_s) * found.topology.chip.efficiency
  mfu = found.mfu * found.step_time_s / (compute_s + exposed_s)
  return [f"{compute_s * 1e3:.0f}", f"{exposed_s * 1e3:.0f}", f"{mfu * 100:.0f}"]


def _peer_line(peer: Peer, own: list[str]) -> str:
  options = f"`{peer.row.name} {peer.row.fields}`".replace(" `", "`")
  theirs = f"{peer.compute_s * 1e3:.0f} | {peer.collectives_s * 1e3:.0f} | {peer.mfu}"
  return f"| {peer.what} | {theirs} | {options} | {' | '.join(own)} |"


if __name__ == "__main__":
  main()
