"""`moejax prune`: drop the experts of a trained mixture of experts that a calibration text misses least."""

import argparse
import pathlib

from moejax import api
from moejax.command_line import path
from moejax.display import Display
from moejax.overrides import override
from moejax.terminal import output
from moejax.training.run_directory import read_experiment
from moejax.verb_arguments import helped, required

PRUNE = """\
RUN is a trained run with sparse layers. NEW is a run at step 0 with the same parameters, in which each sparse layer
has --keep experts: those without the others of which its output for a calibration text changes least. By default NEW
is RUN with _keep_N added. The table and the experts of each layer are written to NEW/pruning.json. Fields of NEW can
be set, as in --training.steps 500 for further training.

examples:
  moejax prune /tmp/moe --keep 6
  moejax prune /tmp/moe /tmp/smaller --keep 6 --data books/*.txt --calibration-tokens 20000"""


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.epilog = PRUNE
  parser.add_argument("run", nargs="?", type=path, metavar="RUN", help="directory of a trained run")
  parser.add_argument("new", nargs="?", type=path, metavar="NEW", help="directory of the new run")
  parser.add_argument("--keep", type=int, metavar="N", help="number of experts of each sparse layer to keep")
  parser.add_argument("--data", nargs="+", metavar="SOURCE", help="calibration text (default: training text of RUN)")
  parser.add_argument(
    "--calibration-tokens", type=int, default=4096, metavar="N", help="size of the calibration text (default: 4096)"
  )
  parser.add_argument(
    "--batch-size", type=int, default=1, metavar="N", help="batch size of the speed measurement (default: 1)"
  )
  parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of that measurement (default: 5)")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  directory = required(known, "run", "RUN")
  keep = required(known, "keep", "--keep N")
  new = known.new or pathlib.Path(f"{directory.absolute()}_keep_{keep}")
  from moejax.interop.prune import pruned_experiment

  there = read_experiment(directory)
  experiment = override(pruned_experiment(there, new, keep), overrides)
  with Display(f"prune {directory}") as display:
    found = api.prune(
      directory,
      new,
      keep,
      data=known.data or (),
      calibration_tokens=known.calibration_tokens,
      batch_size=known.batch_size,
      rounds=known.rounds,
      experiment=experiment,
      progress=display,
    )
  before, after = found["models"]
  rows = [["model", "perplexity", "parameters", "memory per device", f"tokens/s, batch {known.batch_size}"]]
  for row in (before, after):
    megabytes = row["parameters_bytes_per_device"] / 1e6
    rows.append(
      [row["model"], f"{row['perplexity']:.3f}", f"{row['parameters_total']:,}", f"{megabytes:,.1f} MB",
       f"{row['tokens_per_s']:.1f}"]
    )  # fmt: skip
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for cells in rows:
    line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
    output().print(line, highlight=False, markup=False, soft_wrap=True)
  print(f"{new}: moejax train {new}/experiment.json --workdir {new}")
  return 0
