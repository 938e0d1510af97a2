"""Writes docs/ledger.jsonl: predictions of published training runs.

`python docs/ledger.py ROWS.jsonl` reads one run a line (shape, chip, topology, sharding, remat and precision), predicts
it by formula, in seconds, and adds a line. `--compile` compiles the programs of rows that have no line from a program
yet, the cheapest first, and resumes; `--only ID ...` selects rows. `--fit` fits the constants of the formula to the
rows that have `published_s` or `published_teraflops`, prints them, and adds to the lines of these rows their time as
published and as predicted by constants that are fitted to the others (`left_out_s`), from which `python
docs/half_widths.py` computes intervals.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import re
import statistics
import sys
from importlib import metadata
from typing import Any

from moejax import __version__
from moejax.config import AdamW, Data, Evaluation, Experiment, Mesh, Model, MoE, Training
from moejax.config.attention import Attention, GroupedQuery, Latent
from moejax.config.chips import CHIPS
from moejax.config.model import Remat
from moejax.config.parameters import flops_per_token, tokens_per_step
from moejax.config.router import Router
from moejax.config.sharding import DATA_EXPERT_MODEL, Rules
from moejax.errors import UserError
from moejax.files import write_whole
from moejax.planning.estimate import OTHERS, estimate
from moejax.planning.interval import interval
from moejax.planning.kernels import product_speedup
from moejax.planning.meshes import on_topology
from moejax.planning.topology import Topology, parse_topology, prepare_environment

LEDGER = pathlib.Path(__file__).parent / "ledger.jsonl"

LEAVES_TOO_MUCH_OUT = ("gb200",)
"""Features of `needs` without which a prediction would be of something else."""

SUPPORTED = ("sliding window", "sliding window and sinks", "MLA")
"""Features of `needs` that an experiment expresses."""

EIGHT_BITS = {"fp8": "fp8", "mxfp8": "fp8", "int8": "int8"}
"""Features of `needs` whose products, except those of routed experts, are priced at the rate of the type, where the
chip has it. The scales of mxfp8 are not priced."""

FUSED = "fused attention on GPU"
PLAIN_ATTENTION = "axlearn"
"""The framework whose runs on GPU took as long as with plain attention (docs/step-time.md)."""

ROOM = 1.35
"""Programs are compiled if their memory according to the formula is at most this multiple of the limit."""

COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt")

UNLIKE = (("global with head dim", "other heads in global layers"),)
"""Words of the shape of a row, and the features that moejax lacks for it."""

TWO_MATRICES = ("MaxText 22B",)
"""Models with the size in their name if a feed-forward layer has two matrices (here 22.1B; 29.4B with three)."""

REMAT: tuple[tuple[str, Remat], ...] = (
  # Words of a row's `remat`, the first that is there.
  ("as moejax's maxtext", "layer_inputs"),
  ("q, k, v", "attention"),
  ("attention context and second", "attention"),
  ("kept but those of the feed-forward", "attention"),
  ("dots and attention", "dots"),
  ("minimal", "dots"),
  ("layer input", "layer_inputs"),
  ("full", "layer_inputs"),
  ("not stated", "attention"),
  ("none stated", "attention"),
)
UTILISATIONS = [n / 200 for n in range(40, 200)]  # that `--fit` tries


class InexpressibleError(Exception):
  """A row that moejax cannot express; the arguments are the features that it lacks."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One published run."""

  id: str
  experiment: Experiment
  topology: Topology
  missing: tuple[str, ...]
  """Features that it is planned without."""
  speedup: float
  """Of products that are not in bfloat16."""
  published_s: float | None
  balanced: bool = False
  """Whether all experts had the same load."""
  calibrates: bool = True
  """Whether the utilisation of the chip is fitted to it, if its time is given."""


def read_row(values: dict[str, Any]) -> Row:
  """The experiment of one line.

  Raises:
    InexpressibleError: moejax lacks what the row cannot be planned without.
  """
  needs = list(values.get("needs", ()))
  impossible = [need for need in needs if need in LEAVES_TOO_MUCH_OUT]
  shape = values.get("shape")
  if impossible or shape is None:
    raise InexpressibleError(*needs)
  missing, speedup = [need for need in needs if need not in SUPPORTED], 1.0
  if "fsdp 2 between slices" in values["sharding"]:
    missing.append("FSDP across slices")
  missing += [what for words, what in UNLIKE if words in str(shape.get("attention"))]
  topology = _topology(values)
  for need in (need for need in needs if need in EIGHT_BITS):
    try:
      speedup = product_speedup(topology.chip, EIGHT_BITS[need])
    except UserError:  # the chip computes such products in bfloat16
      continue
    if need == EIGHT_BITS[need]:
      missing.remove(need)
      missing += [f"{need} in routed experts"] if shape.get("experts") else []
  if topology.chip.platform == "gpu" and not values["framework"].startswith(PLAIN_ATTENTION):
    missing.append(FUSED)
  remat = next(policy for words, policy in REMAT if words in values["remat"])
  if "sequence" not in values or not values["sequence"]:
    raise InexpressibleError("a stated sequence length")
  mesh = _mesh(values["sharding"], topology, bool(shape.get("experts")))
  if mesh.context > 1:
    missing.remove("context parallelism")
  experiment = Experiment(
    name=values["id"],
    model=_model(shape, remat, values),
    data=Data(sequence_length=values["sequence"]),
    training=Training(batch_size=values["global_batch"], gradient_accumulation=_parts(values, mesh)),
    optimizer=AdamW(learning_rate=3e-4),
    evaluation=Evaluation(batch_size=values["global_batch"]),
    rules=_rules(values["sharding"]),
  )
  if shape["d_model"] % mesh.data:  # more shards than the width can have: the rest are replicas
    shards = math.gcd(shape["d_model"], mesh.data)
    missing.append(f"{mesh.data} shards of a width of {shape['d_model']}")
    mesh = dataclasses.replace(mesh, replica=mesh.replica * mesh.data // shards, data=shards)
  try:
    experiment = on_topology(dataclasses.replace(experiment, mesh=mesh), topology)
  except UserError as error:
    raise InexpressibleError(f"mesh: {error}") from error
  moe = experiment.model.moe
  calibrates = not values["framework"].startswith(PLAIN_ATTENTION) and (moe is None or moe.dispatch.has_capacity)
  balanced = any(word in values.get("note", "") for word in ("forced balance", "random routing"))
  row = Row(values["id"], experiment, topology, tuple(missing), speedup, None, balanced, calibrates)
  return dataclasses.replace(row, published_s=_published_s(values, row))


def whole_row(values: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
  """A row with what it has `as its bf16 row`: the first row of the same chip and model. Rematerialization `as on` some
  number of chips is that of the row of that number."""
  if chips := re.fullmatch(r"as on (\d+)", values.get("remat", "")):
    same = (row for row in rows if (row["chip"], row["model"]) == (values["chip"], values["model"]))
    return values | {"remat": next(row["remat"] for row in same if row["chips"] == int(chips[1]))}
  if values["topology"] != "as its bf16 row":
    return values
  name = f"{values['chip']}-{values['model']}"
  base = next(row for row in rows if row["id"].startswith(name) and "shape" in row)
  kept = {key: values[key] for key in ("id", "precision", "note", "given", "source")}
  return base | kept | {"needs": [*base.get("needs", ()), *values["needs"]]}


def _parts(values: dict[str, Any], mesh: Mesh) -> int:
  """Microbatches of a step, as in `16 parts` or `micro batch 4`, which is of one data-parallel device."""
  if stated := re.search(r"(\d+) parts", values["sharding"]):
    return int(stated[1])
  if local := re.search(r"(?:micro|local) batch (\d+)", values["sharding"]):
    return max(1, values["global_batch"] // (int(local[1]) * mesh.size // mesh.model))
  return 1


def _rules(sharding: str) -> Rules:
  """Without `fsdp`, each device of a row of GPUs has all dense weights."""
  replicated = "fsdp" not in sharding and "micro batch" in sharding
  return tuple((name, () if name == "embed" and replicated else axes) for name, axes in DATA_EXPERT_MODEL)


def _topology(values: dict[str, Any]) -> Topology:
  name = values["topology"] if values["topology"].startswith("gpu:") else f"{values['chip']}:{values['topology']}"
  return parse_topology(name, values["slices"])


def _model(shape: dict[str, Any], remat: Remat, values: dict[str, Any]) -> Model:
  moe = None
  gated = "two matrices" not in shape.get("activation", "") and values.get("model") not in TWO_MATRICES
  if shape.get("experts"):
    capacity = re.search(r"(?:capacity masks, |capacity )([\d.]+)", values.get("note", ""))
    shared = shape.get("shared_experts", 0) or round(shape.get("shared_d_ff", 0) / shape["d_ff"])
    moe = MoE(
      num_experts=shape["experts"],
      experts_per_token=shape["top_k"],
      d_ff=shape["d_ff"],
      every=shape.get("every", 1),
      leading_dense=shape.get("dense_layers_first", 0),
      num_shared_experts=shared,
      dispatch="einsum" if capacity else "grouped",  # type: ignore[arg-type]  # a name stands for its class
      capacity_factor=float(capacity[1].rstrip(".")) if capacity else 1.0,
      group_size=values["sequence"] if capacity and "group = a sequence" in values.get("note", "") else None,
      **({"router": Router(renormalize=False)} if shape["top_k"] == 1 else {}),
    )
  return Model(
    num_layers=shape["layers"],
    d_model=shape["d_model"],
    num_heads=shape["heads"],
    num_kv_heads=shape.get("kv_heads", shape["heads"]),
    head_dim=shape["mla"]["nope"] if "mla" in shape else shape["head_dim"],
    d_ff=shape.get("d_ff_dense", shape["d_ff"]),
    vocab_size=shape["vocab"],
    tie_embeddings=shape.get("tied", False),
    qk_norm=shape.get("qk_norm", False),
    activation="swiglu" if gated else "gelu",
    moe=moe,
    attention=_attention(shape),
    compute_dtype="bfloat16",
    gradient_dtype="compute",  # as the frameworks that were timed
    remat=remat,
  )


def _attention(shape: dict[str, Any]) -> tuple[Attention, ...]:
  """As in `5 local layers (window 1024) to 1 global`, `window of 128 in every second layer` or `every fourth layer
  full`. A pattern that does not divide the layers is spelled out."""
  if "mla" in shape:
    mla = shape["mla"]
    return (Latent(kv_rank=mla["kv_rank"], q_rank=mla["q_rank"], rotary_dim=mla["rope"], value_dim=mla["v"]),)
  words = shape.get("attention", "")
  window = re.search(r"window (?:of )?(\d+)", words)
  if not window:
    return (GroupedQuery(),)
  every = next(number for word, number in (("every second", 2), ("every fourth", 4), ("5 local", 6)) if word in words)
  local, full = (GroupedQuery(window=of, sinks="sinks" in words) for of in (int(window[1]), None))
  pattern = (*[local] * (every - 1), full)
  layers = shape["layers"]
  return pattern if layers % every == 0 else tuple(pattern[layer % every] for layer in range(layers))


def _mesh(sharding: str, topology: Topology, sparse: bool) -> Mesh:
  """As in `fsdp 64 x expert 4`, `data 2 x fsdp 8`, `fsdp 32 x context 2` or `experts over the same 8`. The data axis
  takes what is left."""
  devices = topology.devices
  sizes = {name: 1 for name in ("fsdp", "tensor", "expert", "data", "context")}
  for name, size in re.findall(r"(fsdp|tensor|experts?|data|context) (?:over )?(\d+)", sharding):
    sizes[name.removesuffix("s") if name.startswith("expert") else name] *= int(size)
  if shared := re.search(r"experts over the same (\d+)", sharding):
    sizes["expert"] = int(shared[1])
  model, expert = sizes["tensor"], sizes["expert"] if sparse else 1
  if "fsdp" in sharding or not sparse:
    replica = max(topology.slices, sizes["data"] if "fsdp" in sharding else 1)
  else:  # without `fsdp`, GPUs with the same experts are replicas
    replica = devices // (model * expert) if "micro batch" in sharding else topology.slices
  inside = devices // (replica * model * expert * sizes["context"])
  return Mesh(replica=replica, data=max(1, inside), expert=expert, context=sizes["context"], model=model)


def _published_s(values: dict[str, Any], row: Row) -> float | None:
  """Seconds of a step of a row that is given; TFLOP/s count as MaxText counted them, attention in full."""
  if not values.get("given"):
    return None
  if "published_s" in values:
    return values["published_s"]
  flops = tokens_per_step(row.experiment) * flops_per_token(row.experiment.model, values["sequence"])
  return flops / values["chips"] / (values["published_teraflops"] * 1e12)


def by_formula(row: Row) -> dict[str, Any]:
  """The line of the ledger for a row, by formula."""
  estimated = estimate(row.experiment, row.topology, speedup=row.speedup)
  fits = estimated.memory_bytes <= row.topology.chip.hbm_bytes
  return _line(row, estimated.step_time_s, estimated.memory_bytes, fits, "formula") | {
    "missing": list(row.missing),
    "microbatches": row.experiment.training.gradient_accumulation,
  }


def by_program(row: Row) -> dict[str, Any] | None:
  """The line of the ledger for a row, from its compiled program. None if the compiler finds no room for it.

  A row that moved activations to the host has no room for its batch as a whole, which is then planned in more
  microbatches.
  """
  from moejax.display import Display
  from moejax.planning.compile import compile_step
  from moejax.planning.plan import ROUTER_LOAD, plan_of
  from moejax.planning.precision import SCOPES

  stated = row.experiment.training.gradient_accumulation
  for parts in _possible_parts(row):
    with Display(row.id) as display:
      compiled = compile_step(_in_parts(row.experiment, parts), row.topology, display)
    if not compiled.text:
      continue
    load = 1.0 if row.balanced else ROUTER_LOAD
    found = plan_of(compiled, row.topology, dict.fromkeys(SCOPES, row.speedup), load)
    assert found.breakdown_s
    exposed_s = found.breakdown_s["collective_exposed"]
    line = _line(row, found.step_time_s, found.hbm_bytes_per_device, found.fits, "program")
    more = [f"room for one microbatch ({parts} here)"] if parts > stated else []
    line |= {"missing": [*row.missing, *more], "microbatches": parts, "exposed_s": round(exposed_s, 4)}
    return line | {
      "uncalibrated_s": round(exposed_s + (found.step_time_s - exposed_s) * row.topology.chip.efficiency, 4),
    }
  return None


def _possible_parts(row: Row) -> list[int]:
  """Numbers of microbatches to compile, at most three: from the first that may fit by formula."""
  experiment, stated = row.experiment, row.experiment.training.gradient_accumulation
  of_device = experiment.training.batch_size // (experiment.mesh.size // experiment.mesh.model)
  possible = [parts for parts in range(stated, of_device + 1) if of_device % parts == 0 and parts % stated == 0]
  room = ROOM * row.topology.chip.hbm_bytes
  fitting = [n for n in possible if estimate(_in_parts(experiment, n), row.topology).memory_bytes <= room]
  return (fitting or possible[-1:] or [stated])[:3]


def _in_parts(experiment: Experiment, parts: int) -> Experiment:
  return dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, gradient_accumulation=parts))


def preferred(formula: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
  """The line of a row from its program, if it has one, or by formula. The line has both predictions.

  A program of a dense model in more microbatches than the run had gathers its weights more often, and the formula is
  closer. Of dropless layers, the formula does not know all that moves their rows.
  """
  if "uncalibrated_s" not in before:
    return formula | {"formula_s": formula["predicted_s"]}
  program = again(before)
  kept = {key: program[key] for key in ("uncalibrated_s", "exposed_s", "microbatches")}
  alike = program["microbatches"] == formula["microbatches"]
  line = program if alike or formula["model"] == "moe" else formula | kept
  return line | {"formula_s": formula["predicted_s"], "program_s": program["predicted_s"]}


def again(line: dict[str, Any]) -> dict[str, Any]:
  """A line from a program with today's efficiency and intervals, which needs no compilation."""
  chip = CHIPS[line["chip"]]
  exposed_s = line["exposed_s"]
  seconds = exposed_s + (line["uncalibrated_s"] - exposed_s) / chip.efficiency
  low, high = interval(seconds, chip, line["model"] == "moe", formula=False)
  return line | {"predicted_s": round(seconds, 4), "interval_s": [round(low, 4), round(high, 4)], "source": "program"}


def _line(row: Row, seconds: float, size: float, fits: bool, source: str) -> dict[str, Any]:
  sparse = row.experiment.model.moe is not None
  low, high = interval(seconds, row.topology.chip, sparse, formula=source == "formula")
  return {
    "id": row.id,
    "model": "moe" if sparse else "dense",
    "chip": row.topology.chip.name,
    "predicted_s": round(seconds, 4),
    "interval_s": [round(low, 4), round(high, 4)],
    "fits": fits,
    "hbm_bytes_per_device": round(size),
    "source": source,
    **_versions(),
  }


def _versions() -> dict[str, str]:
  found = {"moejax": __version__}
  for name in COMPILERS:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return found


def _cheap_first(row: Row) -> tuple[bool, int, int]:
  """GPU programs compile in a minute, those of TPU in several, longest for v6e."""
  slow = {"v5e": 0, "v4": 1, "v5p": 2, "tpu7x": 3, "v6e": 4}
  model = row.experiment.model
  return row.topology.chip.platform != "gpu", slow.get(row.topology.chip.name, 0), model.num_layers * model.d_model


def read() -> dict[str, dict[str, Any]]:
  """The lines of the ledger, by id."""
  return {line["id"]: line for line in map(json.loads, LEDGER.read_text().splitlines())} if LEDGER.exists() else {}


def write(lines: dict[str, dict[str, Any]]) -> None:
  """Writes the ledger, in the order of ids."""
  write_whole(LEDGER, "".join(json.dumps(lines[key]) + "\n" for key in sorted(lines)))


def fit(rows: list[Row]) -> tuple[dict[str, float], float, dict[str, float]]:
  """The utilisation of each chip with which the formula has the smallest median error on its rows whose time is given,
  that of a GPU without such rows, and the predictions of each of these rows, by id, with what is fitted to the others.

  Dropless rows and those of axlearn, whose attention may not be fused, are predicted and not fitted: their products are
  not what takes longer.
  """
  own: dict[str, dict[float, float]] = {}  # by published time, since a run may be in two lists
  for row in (row for row in rows if row.published_s and row.calibrates):
    own.setdefault(row.topology.chip.name, {})[round(row.published_s or 0, 3)] = _exact_utilisation(row)
  of_chip = {chip: statistics.median(found.values()) for chip, found in own.items()}
  others = statistics.median(value for chip, value in of_chip.items() if CHIPS[chip].platform == "gpu")
  left_out = {}
  for row in (row for row in rows if row.published_s):
    chip = row.topology.chip.name
    alone = [value for time_s, value in own.get(chip, {}).items() if time_s != round(row.published_s or 0, 3)]
    known = statistics.median(alone or _of_sisters(of_chip, chip) or [others])
    left_out[row.id] = _with(row, known)
  return of_chip, others, left_out


def runs_of_the_page() -> list[Row]:
  """The runs of docs/step-time.md."""
  sys.path.insert(0, str(LEDGER.parent))
  import step_time

  found = []
  for run in (*step_time.CALIBRATING, *step_time.CHECKING):
    experiment, moe = on_topology(run.experiment, run.pod), run.experiment.model.moe
    calibrates = not run.source.startswith(PLAIN_ATTENTION) and (moe is None or moe.dispatch.has_capacity)
    found.append(
      Row(f"{run.topology} {run.name}", experiment, run.pod, (), 1.0, run.published_s, calibrates=calibrates)
    )
  return found


def _of_sisters(of_chip: dict[str, float], chip: str) -> list[float]:
  """The utilisations of the other chips of its platform."""
  platform = CHIPS[chip].platform
  return [value for name, value in of_chip.items() if name != chip and CHIPS[name].platform == platform]


def _with(row: Row, utilisation: float) -> float:
  """The step time by the formula with this utilisation."""
  constants = dataclasses.replace(OTHERS, utilisation=utilisation)
  return estimate(row.experiment, row.topology, constants, row.speedup).step_time_s


def _exact_utilisation(row: Row) -> float:
  """That of UTILISATIONS with which the formula is closest to the published time."""
  return min(UTILISATIONS, key=lambda tried: abs(math.log(_with(row, tried) / (row.published_s or 0.0))))


def main() -> None:
  """Predicts every row by formula, or compiles those that are not in the ledger yet, one at a time."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("rows", type=pathlib.Path)
  parser.add_argument("--compile", action="store_true")
  parser.add_argument("--fit", action="store_true")
  parser.add_argument("--only", nargs="+", metavar="ID", help="only these rows are compiled")
  known = parser.parse_args()
  lists, rows, inexpressible = [json.loads(line) for line in known.rows.read_text().splitlines()], [], {}
  for values in lists:
    try:
      rows.append(read_row(whole_row(values, lists)))
    except InexpressibleError as error:
      nothing = dict.fromkeys(("predicted_s", "interval_s", "fits", "hbm_bytes_per_device"))
      inexpressible[values["id"]] = {"id": values["id"], **nothing, "missing": list(error.args), **_versions()}
  if known.compile:
    compile_rows([row for row in rows if not known.only or row.id in known.only])
    return
  before = read()
  lines = inexpressible | {row.id: preferred(by_formula(row), before.get(row.id, {})) for row in rows}
  if known.fit:
    of_chip, others, left_out = fit([*rows, *runs_of_the_page()])
    print(f"UTILISATION = {of_chip}, of other GPUs {others}")
  for row in (row for row in rows if row.published_s):
    dropless = (moe := row.experiment.model.moe) and not moe.dispatch.has_capacity  # GROUPED was fitted to it by hand
    alone = left_out[row.id] if known.fit and not dropless else before[row.id]["left_out_s"]
    lines[row.id] |= {"published_s": round(row.published_s, 4), "left_out_s": round(alone, 4)}
  write(lines)


def compile_rows(rows: list[Row]) -> None:
  """Adds the lines of rows from their programs. One that has no room, or that the compiler rejects, keeps its line."""
  for row in sorted(rows, key=_cheap_first):
    # Plain attention would be most of a program's time on GPU.
    if "uncalibrated_s" in read().get(row.id, {}) or FUSED in row.missing:
      continue
    prepare_environment(row.topology)
    try:
      line = by_program(row)
    except UserError as error:
      print(f"{row.id}: {error}", file=sys.stderr)
      continue
    if line is None:
      print(f"{row.id}: the compiler finds no room for it", file=sys.stderr)
      continue
    lines = read()
    kept = {key: lines[row.id][key] for key in ("published_s", "left_out_s") if key in lines.get(row.id, {})}
    write(lines | {row.id: line | kept})


if __name__ == "__main__":
  main()
