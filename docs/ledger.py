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
import statistics
import sys
from importlib import metadata
from typing import Any

from moejax import __version__
from moejax.config import Experiment
from moejax.config.chips import CHIPS
from moejax.errors import UserError
from moejax.files import write_whole
from moejax.planning.estimate import OTHERS, Constants, Estimate, estimate
from moejax.planning.interval import interval
from moejax.planning.meshes import on_topology
from moejax.planning.precision import at_precision
from moejax.planning.topology import prepare_environment

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from published_rows import (
  CUDNN_ATTENTION,
  UNSTATED_ATTENTION,
  InexpressibleError,
  Row,
  kernels_as_published,
  read_row,
  whole_row,
)

LEDGER = pathlib.Path(__file__).parent / "ledger.jsonl"

ROOM = 1.35
"""Programs are compiled if their memory according to the formula is at most this multiple of the limit."""

COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt")
UTILISATIONS = [n / 200 for n in range(40, 200)]  # that `--fit` tries


def by_formula(row: Row) -> dict[str, Any]:
  """The line of the ledger for a row, by formula."""
  estimated = _estimated(row)
  fits = estimated.memory_bytes <= row.topology.chip.hbm_bytes
  return _line(row, estimated.step_time_s, estimated.memory_bytes, fits, "formula") | {
    "missing": list(row.missing),
    "microbatches": row.experiment.training.gradient_accumulation,
  }


def by_program(row: Row) -> dict[str, Any] | None:
  """The line of the ledger for a row, from its compiled program. None if the compiler finds no room for it.

  A row whose batch has no room as a whole is planned in more microbatches.
  """
  from moejax.display import Display
  from moejax.planning.compile import compile_step
  from moejax.planning.plan import ROUTER_LOAD, plan_of

  stated = row.experiment.training.gradient_accumulation
  for parts in _possible_parts(row):
    load = 1.0 if row.balanced else ROUTER_LOAD
    with Display(row.id) as display, kernels_as_published(row.plain_attention):
      compiled = compile_step(_in_parts(row.experiment, parts), row.topology, display)
      if not compiled.text:
        continue
      found = plan_of(compiled, row.topology, at_precision(compiled.experiment, row.precision).model.precision, load)
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
  closer. Of dropless layers, the formula does not know all that moves their rows, so that such a program counts if it
  fits.
  """
  if "uncalibrated_s" not in before:
    return formula | {"formula_s": formula["predicted_s"]}
  program = again(before)
  kept = {key: program[key] for key in ("uncalibrated_s", "exposed_s", "microbatches")}
  alike = program["microbatches"] == formula["microbatches"]
  counts = alike or (formula["model"] == "moe" and program["fits"])
  line = program if counts else formula | kept
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

  Dropless rows and those of axlearn, whose attention is not stated, are predicted and not fitted: their products are
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
  import step_time

  found = []
  for run in (*step_time.CALIBRATING, *step_time.CHECKING):
    experiment, moe = on_topology(run.experiment, run.pod), run.experiment.model.moe
    calibrates = not run.source.startswith(UNSTATED_ATTENTION) and (moe is None or moe.dispatch.has_capacity)
    found.append(
      Row(f"{run.topology} {run.name}", experiment, run.pod, (), "bfloat16", run.published_s, calibrates=calibrates)
    )
  return found


def _of_sisters(of_chip: dict[str, float], chip: str) -> list[float]:
  """The utilisations of the other chips of its platform."""
  platform = CHIPS[chip].platform
  return [value for name, value in of_chip.items() if name != chip and CHIPS[name].platform == platform]


def _with(row: Row, utilisation: float) -> float:
  """The step time by the formula with this utilisation."""
  return _estimated(row, dataclasses.replace(OTHERS, utilisation=utilisation)).step_time_s


def _estimated(row: Row, constants: Constants | None = None) -> Estimate:
  """A row by formula, with the kernels of its framework."""
  with kernels_as_published(row.plain_attention):
    return estimate(at_precision(row.experiment, row.precision), row.topology, constants, CUDNN_ATTENTION)


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
  """Adds the lines of rows from their programs. One that has no room, or that the compiler rejects, keeps its line, as
  one does whose program on GPU would have plain attention because devices share sequences."""
  for row in sorted(rows, key=_cheap_first):
    if "uncalibrated_s" in read().get(row.id, {}):
      continue
    if row.topology.chip.platform == "gpu" and row.experiment.mesh.context > 1:
      print(f"{row.id}: its program has plain attention, which the run had not", file=sys.stderr)
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
