"""Prints the constants of moejax/planning/interval.py, from docs/step-time.md and docs/ledger.jsonl.

An error is the logarithm of predicted over published time of a run that was predicted without its own time.
`calibrated` has runs with the efficiency of the other runs from which that of their chip comes; `sister` has runs on
TPU with the mean efficiency of the other TPUs; `formula` has runs of the ledger with constants of the formula that are
fitted to the other runs. The error of a ratio is the root mean square of the differences between the errors of two runs
of one framework on one chip.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import re
import statistics
from collections.abc import Iterable

from moejax.config.chips import CHIPS
from moejax.planning.interval import half_width

DOCS = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of docs/step-time.md."""

  chip: str
  framework: str
  ratio: float
  """Predicted over published time."""
  efficiency: float | None
  """That with which they are equal; None where the run does not calibrate its chip."""


def runs(page: str) -> list[Run]:
  """The runs in both tables of the page."""
  frameworks = dict(re.findall(r"^- (.+?): (\w[\w-]*)[,/]", page.partition("## Sources")[2], re.MULTILINE))
  found = []
  for line in page.splitlines():
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if len(cells) not in (5, 7) or not re.match(r"\d", cells[2]):
      continue
    where, name = cells[0], cells[1].split(" ")[0]
    chip = re.sub(r"^\d+ slices of |^gpu:", "", where).partition(":")[0]
    efficiency = float(cells[4]) if len(cells) == 7 else None
    found.append(Run(chip, frameworks[f"{where}, {name}"], float(cells[-1]), efficiency))
  return found


def calibrated_errors(found: list[Run]) -> list[float]:
  """Of runs on chips with other runs, or whose sisters have some, with the mean efficiency of those."""
  errors = []
  for run in found:
    known = CHIPS[run.chip].runs_are_of
    others = _efficiencies(other for other in found if other is not run and other.chip in known)
    if others and run.efficiency is not None:
      errors.append(math.log(run.efficiency / statistics.geometric_mean(others)))
    elif run.efficiency is None:
      errors.append(math.log(run.ratio))
  return errors


def sister_errors(found: list[Run]) -> list[float]:
  """Of runs on TPU, with the mean efficiency of the other TPUs."""
  tpus = {run.chip for run in found if re.match(r"v\d|tpu", run.chip)}
  mean = {chip: statistics.geometric_mean(_efficiencies(run for run in found if run.chip == chip)) for chip in tpus}
  return [
    math.log(run.efficiency / statistics.geometric_mean([mean[chip] for chip in tpus if chip != run.chip]))
    for run in found
    if run.chip in tpus and run.efficiency is not None
  ]


def formula_errors(lines: Iterable[dict], model: str) -> list[float]:
  """Of the runs of the ledger whose time is given, by a formula that was fitted to the others."""
  return [
    math.log(line["left_out_s"] / line["published_s"])
    for line in lines
    if line.get("left_out_s") and line["model"] == model
  ]


def ratio_error(found: list[Run]) -> float:
  """Of the ratio of two runs of one framework on one chip."""
  differences = [
    math.log(one.ratio / other.ratio)
    for one, other in itertools.combinations(found, 2)
    if (one.chip, one.framework) == (other.chip, other.framework)
  ]
  return math.sqrt(statistics.fmean(difference**2 for difference in differences))


def constants() -> tuple[dict[str, dict[str, float]], float]:
  """HALF_WIDTH and RATIO_ERROR, rounded to what the file has."""
  found = runs((DOCS / "step-time.md").read_text())
  lines = [json.loads(line) for line in (DOCS / "ledger.jsonl").read_text().splitlines()]
  errors = {"calibrated": calibrated_errors(found), "sister": sister_errors(found)}
  widths = {kind: dict.fromkeys(("dense", "moe"), round(half_width(of), 2)) for kind, of in errors.items()}
  # A chip without runs of its own is not known better than one that has some, whatever few errors say.
  widths["sister"] = {model: max(widths["sister"][model], widths["calibrated"][model]) for model in widths["sister"]}
  widths["formula"] = {model: round(half_width(formula_errors(lines, model)), 2) for model in ("dense", "moe")}
  return widths, round(ratio_error(found), 2)


def _efficiencies(found: Iterable[Run]) -> list[float]:
  return [run.efficiency for run in found if run.efficiency is not None]


def main() -> None:
  """Prints what follows, and how many errors it is from."""
  found = runs((DOCS / "step-time.md").read_text())
  lines = [json.loads(line) for line in (DOCS / "ledger.jsonl").read_text().splitlines()]
  widths, ratio = constants()
  for name, errors in (
    ("calibrated", calibrated_errors(found)),
    ("sister", sister_errors(found)),
    *((f"formula, {model}", formula_errors(lines, model)) for model in ("dense", "moe")),
  ):
    shown = ", ".join(f"{math.expm1(error):+.0%}" for error in sorted(errors))
    print(f"{name}: half-width {half_width(errors):.2f} from {len(errors)} errors: {shown}")
  print(f"HALF_WIDTH = {widths}\nRATIO_ERROR = {ratio}")


if __name__ == "__main__":
  main()
