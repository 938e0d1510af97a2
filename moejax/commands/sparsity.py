"""`moejax sparsity`: measure quality and speed of a DS-MoE with fewer experts."""

import argparse
from typing import Any

from moejax import api, processes
from moejax.command_line import path
from moejax.config.fields import with_fields
from moejax.display import make_display
from moejax.overrides import override
from moejax.terminal import output
from moejax.training.run_directory import check_only_operational, read_experiment
from moejax.verb_arguments import helped, required

SPARSITY = """\
RUN is a model that was trained with all experts (router.kind dense). Each mode of sparse inference is scored on the
held-out text of RUN, or on --data, and timed. The table and the experts per token of each layer are written to
RUN/sparsity.json, and plotted in RUN/sparsity.png and RUN/sparsity_layers.png. Fields that do not affect the trained
model can be set, as in --evaluation.max-tokens 100000.

examples:
  moejax sparsity /tmp/ds
  moejax sparsity /tmp/ds --modes top_k:4 top_k:8 threshold:0.48 --max-increase 0.01 --batch-sizes 1
  moejax sparsity /tmp/ds --tasks sciq lambada_openai --limit 200 --evaluation.task-data DIR"""


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.epilog = SPARSITY
  parser.add_argument("run", nargs="?", type=path, metavar="RUN", help="directory of a trained run")
  parser.add_argument(
    "--modes", nargs="+", metavar="MODE[:X]", help="modes, as --sparse of `moejax generate` takes (default: a sweep)"
  )
  parser.add_argument(
    "--data", nargs="+", metavar="SOURCE", help="text to score on (default: the held-out text of RUN)"
  )
  parser.add_argument(
    "--max-increase", type=float, default=0.03, metavar="X",
    help="recommend the mode with the fewest active parameters whose perplexity is at most this fraction above that of "
    "all experts (default: 0.03)",
  )  # fmt: skip
  parser.add_argument(
    "--batch-sizes", nargs="*", type=int, default=[1, 16], metavar="N",
    help="batch sizes to measure tokens per second for; none skips the measurement (default: 1 16)",
  )  # fmt: skip
  parser.add_argument(
    "--tasks", nargs="+", metavar="TASK",
    help="benchmarks to run in each mode, as `moejax evaluate` takes (default: none)",
  )  # fmt: skip
  parser.add_argument("--limit", type=int, metavar="N", help="use the first N examples of each task (default: all)")
  parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements per mode (default: 5)")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  directory = required(known, "run", "RUN")
  there = read_experiment(directory)
  experiment = override(with_fields(there, {"evaluation.task_limit": None}), overrides)
  check_only_operational(there, experiment)
  api.join()
  with make_display(f"sparsity {directory}") as progress:
    found = api.sparsity(
      directory,
      known.modes or (),
      data=known.data or (),
      max_increase=known.max_increase,
      batch_sizes=known.batch_sizes,
      rounds=known.rounds,
      tasks=known.tasks or (),
      limit=known.limit,
      experiment=experiment,
      progress=progress,
    )
  for line in _table(found) if processes.is_first() else ():
    output().print(line, highlight=False, markup=False, soft_wrap=True)
  return 0


def _table(found: dict[str, Any]) -> list[str]:
  """The modes as aligned lines, and the recommendation."""
  sizes = list(found["modes"][0].get("tokens_per_s", {}))
  scores = [name for name in found["modes"][0].get("tasks", {}) if not name.endswith("_stderr")]
  heads = ["mode", "perplexity", "increase", "active parameters", "experts per token"]
  rows = [heads + [f"tokens/s, batch {size}" for size in sizes] + scores]
  for row in found["modes"]:
    used = row["experts_per_token"]
    rows.append(
      [
        row["mode"],
        f"{row['perplexity']:.3f}",
        f"{row['perplexity_increase']:+.1%}",
        f"{row['parameters_active']:,} ({row['active_fraction']:.0%})",
        f"{sum(used) / len(used):.1f} ({min(used):.1f} to {max(used):.1f})",
        *(f"{row['tokens_per_s'][size]:.1f}" for size in sizes),
        *(f"{row['tasks'][score]:.4g}" for score in scores),
      ]
    )
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
  return [
    *lines,
    f"Fewest active parameters with a perplexity at most {found['max_increase']:.1%} higher: {found['chosen']}",
  ]
