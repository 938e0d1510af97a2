"""Writes docs/ledger.jsonl: predictions of published training runs.

`python docs/ledger.py ROWS.jsonl` reads one run a line (shape, chip, topology, sharding, remat and precision), plans it
and adds a line. It resumes. `--formula` predicts by formula alone, in seconds; without it, each program is compiled,
those of GPUs and of small models first. `--fit` fits the constants of the formula to the rows that have `published_s`
or `published_teraflops`, prints them, and adds to the lines of these rows their time as published and as predicted by
constants that are fitted to the others (`left_out_s`), from which `python docs/half_widths.py` computes intervals.
"""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import re
import sys
from importlib import metadata
from typing import Any

from moejax import __version__
from moejax.config import AdamW, Data, Evaluation, Experiment, Mesh, Model, MoE, Training
from moejax.config.chips import CHIPS
from moejax.config.model import Remat
from moejax.config.parameters import flops_per_token, tokens_per_step
from moejax.errors import UserError
from moejax.files import write_whole
from moejax.planning.estimate import Constants, estimate
from moejax.planning.interval import interval
from moejax.planning.kernels import product_speedup
from moejax.planning.meshes import on_topology
from moejax.planning.topology import Topology, parse_topology, prepare_environment

LEDGER = pathlib.Path(__file__).parent / "ledger.jsonl"

LEAVES_TOO_MUCH_OUT = ("MLA", "context parallelism", "gb200")
"""Features of `needs` without which a prediction would be of something else."""

EIGHT_BITS = {"fp8": "fp8", "mxfp8": "fp8", "int8": "int8"}
"""Features of `needs` that the formula prices by the rate of their products, where the chip has it."""

FUSED = "fused attention on GPU"

PLAIN_ATTENTION = "axlearn"
"""The framework whose runs on GPU took as long as with plain attention (docs/step-time.md)."""

COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt")

REMAT: tuple[tuple[str, Remat], ...] = (
  # Words of a row's `remat`, the first that is there.
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


UTILISATIONS = [n / 40 for n in range(14, 40)]
PARTS = [n / 10 for n in range(10)]
"""Values of the formula's constants that `--fit` tries. Collectives are never hidden as a whole: of two layouts whose
products take the same time, the one that moves less should be estimated faster."""


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
  missing, speedup = list(needs), 1.0
  if "fsdp 2 between slices" in values["sharding"]:
    missing.append("FSDP across slices")
  topology = _topology(values)
  for need in (need for need in needs if need in EIGHT_BITS):
    try:
      speedup = product_speedup(topology.chip, EIGHT_BITS[need])
    except UserError as error:
      raise InexpressibleError(*needs) from error
  if topology.chip.platform == "gpu" and not values["framework"].startswith(PLAIN_ATTENTION):
    missing.append(FUSED)
  remat = as_in(values["remat"]) or next(policy for words, policy in REMAT if words in values["remat"])
  if "sequence" not in values or not values["sequence"]:
    raise InexpressibleError("a stated sequence length")
  parts = re.search(r"(\d+) parts", values["sharding"])
  experiment = Experiment(
    name=values["id"],
    model=_model(shape, remat, values),
    data=Data(sequence_length=values["sequence"]),
    training=Training(batch_size=values["global_batch"], gradient_accumulation=int(parts[1]) if parts else 1),
    optimizer=AdamW(learning_rate=3e-4),
    evaluation=Evaluation(batch_size=values["global_batch"]),
  )
  mesh = _mesh(values["sharding"], topology, bool(shape.get("experts")))
  if shape["d_model"] % mesh.data:  # more shards than the width can have: the rest are replicas
    shards = math.gcd(shape["d_model"], mesh.data)
    missing.append(f"{mesh.data} shards of a width of {shape['d_model']}")
    mesh = dataclasses.replace(mesh, replica=mesh.replica * mesh.data // shards, data=shards)
  try:
    experiment = on_topology(dataclasses.replace(experiment, mesh=mesh), topology)
  except UserError as error:
    raise InexpressibleError(f"mesh: {error}") from error
  row = Row(values["id"], experiment, topology, tuple(missing), speedup, None)
  return dataclasses.replace(row, published_s=_published_s(values, row))


def whole_row(values: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
  """A row with what it has `as its bf16 row`: the first row of the same chip and model."""
  if values["topology"] != "as its bf16 row":
    return values
  name = f"{values['chip']}-{values['model']}"
  base = next(row for row in rows if row["id"].startswith(name) and "shape" in row)
  kept = {key: values[key] for key in ("id", "precision", "note", "given", "source")}
  return base | kept | {"needs": [*base.get("needs", ()), *values["needs"]]}


def as_in(remat: str) -> Remat | None:
  """The policy of a listed experiment that a row names, as in `as moejax's maxtext_16b on one slice`."""
  named = re.search(r"as moejax's (\w+)", remat)
  if remat.startswith("as on"):
    return "dots"
  return "layer_inputs" if named else None


def _topology(values: dict[str, Any]) -> Topology:
  name = values["topology"] if values["topology"].startswith("gpu:") else f"{values['chip']}:{values['topology']}"
  return parse_topology(name, values["slices"])


def _model(shape: dict[str, Any], remat: Remat, values: dict[str, Any]) -> Model:
  moe = None
  gated = "two matrices" not in shape.get("activation", "")
  if shape.get("experts"):
    capacity = re.search(r"(?:capacity masks, |capacity )([\d.]+)", values.get("note", ""))
    shared = shape.get("shared_experts", 0) or round(shape.get("shared_d_ff", 0) / shape["d_ff"])
    moe = MoE(
      num_experts=shape["experts"],
      experts_per_token=shape["top_k"],
      d_ff=shape["d_ff"],
      every=shape.get("every", 1),
      num_shared_experts=shared,
      dispatch="einsum" if capacity else "grouped",  # type: ignore[arg-type]  # a name stands for its class
      capacity_factor=float(capacity[1].rstrip(".")) if capacity else 1.0,
      group_size=values["sequence"] if capacity and "group = a sequence" in values.get("note", "") else None,
      **({"router": _scores_only(shape["top_k"])} if shape["top_k"] == 1 else {}),
    )
  return Model(
    num_layers=shape["layers"],
    d_model=shape["d_model"],
    num_heads=shape["heads"],
    num_kv_heads=shape.get("kv_heads", shape["heads"]),
    head_dim=shape["head_dim"],
    d_ff=shape.get("d_ff_dense", shape["d_ff"]),
    vocab_size=shape["vocab"],
    tie_embeddings=shape.get("tied", False),
    qk_norm=shape.get("qk_norm", False),
    activation="swiglu" if gated else "gelu",
    moe=moe,
    compute_dtype="bfloat16",
    gradient_dtype="compute",  # as the frameworks that were timed
    remat=remat,
  )


def _scores_only(experts_per_token: int) -> Any:
  """A router whose weights are the scores, as one choice a token needs."""
  from moejax.config.router import Router

  return Router(renormalize=experts_per_token > 1)


def _mesh(sharding: str, topology: Topology, sparse: bool) -> Mesh:
  """As in `fsdp 64 x expert 4`, `data 2 x fsdp 8` or `experts over the same 8`. The data axis takes what is left."""
  devices = topology.devices
  sizes = {name: 1 for name in ("fsdp", "tensor", "expert", "data")}
  for name, size in re.findall(r"(fsdp|tensor|experts?|data) (\d+)", sharding):
    sizes[name.removesuffix("s") if name.startswith("expert") else name] *= int(size)
  if shared := re.search(r"experts over the same (\d+)", sharding):
    sizes["expert"] = int(shared[1])
  model, expert = sizes["tensor"], sizes["expert"] if sparse else 1
  if "fsdp" in sharding or not sparse:
    replica = max(topology.slices, sizes["data"] if "fsdp" in sharding else 1)
  else:
    replica = topology.slices
  inside = devices // (replica * model * expert)
  return Mesh(replica=replica, data=max(1, inside), expert=expert, model=model)


def _published_s(values: dict[str, Any], row: Row) -> float | None:
  """Seconds of a step of a row that is given; TFLOP/s count as MaxText counted them, attention in full."""
  if not values.get("given"):
    return None
  if "published_s" in values:
    return values["published_s"]
  flops = tokens_per_step(row.experiment) * flops_per_token(row.experiment.model, values["sequence"])
  return flops / values["chips"] / (values["published_teraflops"] * 1e12)


def predicted(row: Row, by_formula: bool) -> dict[str, Any]:
  """The line of the ledger for a row."""
  sparse = row.experiment.model.moe is not None
  facts: dict[str, Any] = {"id": row.id, "model": "moe" if sparse else "dense", "chip": row.topology.chip.name}
  if by_formula:
    estimated = estimate(row.experiment, row.topology, speedup=row.speedup)
    seconds, size = estimated.step_time_s, estimated.memory_bytes
    fits, source = size <= row.topology.chip.hbm_bytes, "formula"
    low, high = interval(seconds, row.topology.chip, sparse, formula=True)
  else:
    from moejax.display import Display
    from moejax.planning.plan import plan

    with Display(row.id) as display:
      found = plan(row.experiment, row.topology, display)
    seconds, size, fits = found.step_time_s, found.hbm_bytes_per_device, found.fits
    source = "formula" if found.refused else "program"
    low, high = found.step_time_interval_s
  return facts | {
    "predicted_s": round(seconds, 4),
    "interval_s": [round(low, 4), round(high, 4)],
    "fits": fits,
    "hbm_bytes_per_device": round(size),
    "missing": list(row.missing),
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


def write(lines: dict[str, dict[str, Any]]) -> None:
  """Writes the ledger, in the order of ids."""
  write_whole(LEDGER, "".join(json.dumps(lines[key]) + "\n" for key in sorted(lines)))


def fit(rows: list[Row]) -> tuple[Constants, dict[str, float]]:
  """The constants of the formula that have the smallest mean error on the rows whose time is given, and the predictions
  of each of these rows, by id, by constants that are fitted to the others."""
  given = [row for row in rows if row.published_s]
  errors = {
    constants: [
      abs(math.log(estimate(row.experiment, row.topology, constants).step_time_s / row.published_s)) for row in given
    ]
    for constants in map(Constants, *zip(*itertools.product(UTILISATIONS, PARTS, PARTS), strict=True))
  }
  left_out = {}
  for i, row in enumerate(given):
    of_others = min(errors, key=lambda constants: sum(errors[constants]) - errors[constants][i])
    left_out[row.id] = estimate(row.experiment, row.topology, of_others).step_time_s
  return min(errors, key=lambda constants: sum(errors[constants])), left_out


def main() -> None:
  """Adds what is not in the ledger yet, one row at a time."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("rows", type=pathlib.Path)
  parser.add_argument("--formula", action="store_true")
  parser.add_argument("--fit", action="store_true")
  parser.add_argument("--chips", nargs="+", default=list(CHIPS), help="only rows of these chips")
  known = parser.parse_args()
  lines = {line["id"]: line for line in map(json.loads, LEDGER.read_text().splitlines())} if LEDGER.exists() else {}
  rows = []
  lists = [json.loads(line) for line in known.rows.read_text().splitlines()]
  for values in lists:
    try:
      rows.append(read_row(whole_row(values, lists)))
    except InexpressibleError as error:
      lines[values["id"]] = {"id": values["id"], "predicted_s": None, "interval_s": None, "fits": None,
                             "hbm_bytes_per_device": None, "missing": list(error.args), **_versions()}  # fmt: skip
  if known.fit:
    fitted, left_out = fit(rows)
    print(fitted)
    for row in (row for row in rows if row.id in left_out and row.published_s):
      lines[row.id] |= {"published_s": round(row.published_s, 4), "left_out_s": round(left_out[row.id], 4)}
    write(lines)
    return
  for row in sorted(rows, key=_cheap_first):
    done = lines.get(row.id, {}).get("source")
    if row.topology.chip.name not in known.chips or done == "program":
      continue
    prepare_environment(row.topology)
    try:
      # Plain attention would be most of a program's time on GPU, and moejax has no 8-bit products.
      by_formula = known.formula or FUSED in row.missing or row.speedup != 1
      kept = {key: lines[row.id][key] for key in ("published_s", "left_out_s") if key in lines.get(row.id, {})}
      lines[row.id] = predicted(row, by_formula) | kept
    except UserError as error:  # the line by formula stays
      print(f"{row.id}: {error}", file=sys.stderr)
    write(lines)
  write(lines)


if __name__ == "__main__":
  main()
