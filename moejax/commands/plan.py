"""`moejax plan`: predict step time and memory on a TPU or GPU topology."""

import argparse
from typing import Any

from rich.console import Group
from rich.text import Text

from moejax import api_planning, lookup
from moejax.command_line import NAME, path
from moejax.config.experiment import Experiment
from moejax.display import Display
from moejax.errors import UserError
from moejax.files import write_json, write_whole
from moejax.overrides import override, override_pair
from moejax.terminal import output
from moejax.verb_arguments import helped, prepare_files, required

TRIES = 8
"""Default of --tries, the number of configurations that a search compiles."""


DOES_NOT_FIT = 3


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "name", nargs="?", metavar="NAME",
    help=f"{NAME}; or another project's model: hf:PATH to a Hugging Face config.json, maxtext:PATH.yml,NAME=VALUE,...",
  )  # fmt: skip
  parser.add_argument(
    "other", nargs="?", metavar="OTHER",
    help="a second experiment, to compare the two step times by operation; options set the fields of OTHER, and "
    "--dense.PATH sets a field of NAME",
  )  # fmt: skip
  add_topology(parser)
  add_price(parser)
  parser.add_argument(
    "--load", nargs="+", default=[], metavar="LOAD",
    help="also plan these unbalanced router loads: numbers (load of the busiest device or expert divided by the mean), "
    "directories of finished runs, whose measured load is used, or worst",
  )  # fmt: skip
  parser.add_argument(
    "--precision", nargs="+", default=[], metavar="TYPE",
    help="also plan the products of projections, feed-forward layers and experts in these types: bfloat16, fp8, int8",
  )  # fmt: skip
  parser.add_argument(
    "--offload", nargs="+", default=[], metavar="GROUP",
    help="also estimate the effect of keeping activations or moments (or both) in host memory",
  )  # fmt: skip
  parser.add_argument(
    "--without", nargs="+", default=[], metavar="FEATURE",
    help="plan an hf: or maxtext: model without these features, which moejax does not support; the error message for "
    "such a model lists them",
  )  # fmt: skip
  parser.add_argument(
    "--against", metavar="MEASURED",
    help="compare the prediction with a measured step time, in seconds or as the directory of a run; with "
    "--calibration, add both to the file to calibrate later plans",
  )  # fmt: skip
  parser.add_argument(
    "--search", action="store_true", help="search over meshes, remat, gradient accumulation and dispatch. Resumable."
  )
  parser.add_argument(
    "--tries", type=int, metavar="N", help=f"number of configurations that --search compiles (default: {TRIES})"
  )
  parser.add_argument("--json", type=path, metavar="FILE", help="also write all numbers to FILE")
  parser.add_argument("--html", type=path, metavar="FILE", help="also write the plan as an HTML page to FILE")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  name, topology = required(known, "name", "NAME"), required(known, "topology", "--topology NAME")
  experiment, missing = _planned(known, name, topology)
  prepare_files(known, "json", "html", *(["calibration"] if known.against else []))
  for option, given in (("--search", known.search), (f"two experiments ({known.other})", known.other)):
    if known.against and given:
      raise UserError(f"--against requires the plan of a single experiment; remove it or {option}")
  if known.tries is not None and not known.search:
    raise UserError("--tries has no effect without --search; add --search, or remove --tries")
  if known.other is not None:
    return _beside(known, experiment, topology, overrides)
  experiment = override(experiment, overrides)
  if known.search:
    return _search(known, experiment, topology)
  described = api_planning.described_topology(
    topology, known.slices, known.calibration, to_record=known.against is not None
  )
  from moejax.planning.against import measured_step_s, record_step
  from moejax.planning.compile import compile_step
  from moejax.planning.hints import hints
  from moejax.planning.load import load_page, plan_loads
  from moejax.planning.offload import check_offload, offloaded
  from moejax.planning.page import as_html, plan_page
  from moejax.planning.plan import plan_of
  from moejax.planning.precision import check_precisions, plan_precisions, precision_page
  from moejax.planning.run_cost import run_cost

  measured_s = measured_step_s(known.against, experiment, described) if known.against is not None else None
  check_offload(known.offload, experiment, described.chip)
  check_precisions(known.precision, described)
  with Display(f"plan {experiment.name}") as display:
    loaded = plan_loads(experiment, described, known.load, display) if known.load else []
    # What is moved to the host need not fit on the device.
    compiled = compile_step(experiment, described, display, beyond_memory=bool(known.offload))
    display.stage("reading the program")
    planned = plan_of(compiled, described)
  precise = plan_precisions(compiled, described, known.precision) if known.precision else []
  whole = run_cost(planned, known.price_per_chip_hour)
  lines = [whole.summary, *(f"planned without {feature}: {what}" for feature, what in missing.items())]
  against = None if measured_s is None else record_step(planned, measured_s, known.calibration)
  moved = offloaded(planned, known.offload) if known.offload else None
  lines += [one.summary for one in (moved, against) if one is not None]
  tables = [*([load_page(loaded)] if loaded else []), *([precision_page(precise)] if precise else [])]
  page = Group(plan_page(planned), *tables, *map(Text, lines))
  output().print(page, soft_wrap=True)
  if known.json:
    more: dict[str, Any] = {
      "hints": hints(planned),
      "run": whole.to_json(),
      "planned_without": list(missing),
      "against": against and against.to_json(),
      "offload": moved and moved.to_json(),
      "loads": [one.to_json() for one in loaded],
      "precisions": [one.to_json() for one in precise],
    }
    write_json(known.json, planned.to_json() | more)
  if known.html:
    write_whole(known.html, as_html(f"{experiment.name} on {topology}", page))
  return 0 if planned.fits else DOES_NOT_FIT


def _beside(known: argparse.Namespace, first: Experiment, topology: str, overrides: list[str]) -> int:
  for option, given in (
    ("--search", known.search),
    ("--load", known.load),
    ("--precision", known.precision),
    ("--offload", known.offload),
  ):
    if given:
      raise UserError(f"{option} requires a single experiment; remove {known.other}")
  second, _ = _planned(known, known.other, topology)
  first, second = override_pair(first, second, overrides)
  with Display(f"plan {first.name} and {second.name}") as display:
    plans = [
      api_planning.plan(each, topology, slices=known.slices, calibration=known.calibration, progress=display)
      for each in (first, second)
    ]
  from moejax.planning.beside import beside, beside_page
  from moejax.planning.page import as_html
  from moejax.planning.run_cost import run_cost

  costs = [Text(f"{one.experiment.name}, {run_cost(one, known.price_per_chip_hour).summary}") for one in plans]
  page = Group(beside_page(*plans), *costs)
  output().print(page, soft_wrap=True)
  if known.json:
    write_json(known.json, {"plans": [one.to_json() for one in plans], "scopes": beside(*plans)})
  if known.html:
    write_whole(known.html, as_html(f"{first.name} and {second.name} on {topology}", page))
  return 0 if all(one.fits for one in plans) else DOES_NOT_FIT


def _planned(known: argparse.Namespace, name: str, topology: str) -> tuple[Experiment, dict[str, str]]:
  """Returns the experiment to plan, which may be a configuration of another project, and the features it lacks."""
  from moejax.interop.foreign import foreign_experiment, is_foreign

  if is_foreign(name):
    devices = api_planning.described_topology(topology, known.slices).devices
    return foreign_experiment(name, devices, tuple(known.without))
  if known.without:
    raise UserError(
      "--without applies only to hf: and maxtext: configurations; set the fields of an experiment instead"
    )
  return lookup.find_experiment(name), {}


def _search(known: argparse.Namespace, experiment: Experiment, topology: str) -> int:
  described = api_planning.described_topology(topology, known.slices, known.calibration)
  from moejax.planning.page import as_html
  from moejax.planning.search import search, search_page

  with Display(f"search {experiment.name}") as display:
    tried = search(experiment, described, TRIES if known.tries is None else known.tries, display)
  output().print(search_page(tried), soft_wrap=True)
  if known.json:
    write_json(known.json, [found.to_json() for found in tried])
  if known.html:
    write_whole(known.html, as_html(f"{experiment.name} on {topology}: layouts", search_page(tried)))
  return 0 if tried[0].plan.fits else DOES_NOT_FIT


def add_topology(parser: argparse.ArgumentParser) -> None:
  known = "v4:8x8x8, v5e:16x16, v5p:4x8x8, v6e:16x16, tpu7x:4x4x8, gpu:h100:8, cpu:8"
  parser.add_argument("--topology", metavar="NAME", help=f"topology, such as {known}")
  parser.add_argument(
    "--slices", type=int, default=1, metavar="N",
    help="number of slices, connected by the data-center network (default: 1)",
  )  # fmt: skip
  parser.add_argument(
    "--calibration", type=path, metavar="FILE",
    help="file with measurements of `moejax calibrate` and --against (default: calibration with published runs)",
  )  # fmt: skip


def add_price(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--price-per-chip-hour", type=float, metavar="X",
    help="price in any currency, to estimate the cost of the whole run",
  )  # fmt: skip
