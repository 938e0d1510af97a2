"""Defines the commands, their options and their help."""

import argparse
import importlib
import pathlib
from types import ModuleType
from typing import NoReturn

import moejax
from moejax.errors import UserError

COMMANDS = {
  "list": ("listing", "List all experiments and suites."),
  "show": ("show", "Show an experiment or a suite: parameters, FLOPs, budget and all fields."),
  "train": ("train", "Train an experiment and evaluate it on held-out text. Resumes from the latest checkpoint."),
  "compare": (
    "compare",
    "Compare dense and MoE models at equal step time: measure, match, train, evaluate, report. Resumable.",
  ),
  "evaluate": ("evaluate", "Run lm-evaluation-harness benchmarks on a trained model. Resumable."),
  "generate": ("generate", "Generate text with a trained model."),
  "sparsity": ("sparsity", "Measure quality and speed of a DS-MoE with fewer experts."),
  "import": ("import_run", "Convert a model in Hugging Face format to a run."),
  "export": ("export_run", "Convert a run to a model in Hugging Face format."),
  "upcycle": ("upcycle_run", "Convert a dense run to a sparse run, which initially computes the same function."),
  "prune": ("prune_run", "Drop the experts of a trained MoE that a calibration text misses least."),
  "data": ("data", "Tokenize text once into shards that any number of runs and hosts can read. Resumable."),
  "tokenizer": ("tokenizer", "Train a byte-level BPE tokenizer on text."),
  "plan": ("plan", "Predict step time and memory on a TPU or GPU topology. No accelerator is needed."),
  "match": (
    "match",
    "Find the MoE model with the step time of a dense model on a TPU or GPU topology. No accelerator is needed.",
  ),
  "decide": (
    "decide",
    "Decide between dense and MoE models for a topology and a budget, with the probability. No accelerator is needed.",
  ),
  "check-claim": ("check_claim", "Restate a published claim about dense and MoE models at equal step time."),
  "fit": ("fit", "Fit scaling laws to finished runs, and weigh published laws by them."),
  "calibrate": ("calibrate", "Measure the speed of an accelerator of this machine, to calibrate plans."),
  "report": ("report", "Regenerate the report of a comparison."),
  "wandb": ("wandb", "Send the metrics of a run or a comparison to Weights & Biases, also while it trains."),
  "watch": ("watch", "Serve the report of a comparison on this machine while it runs, with live updates."),
}
"""The file in moejax/commands/ and the description of each command."""

DESCRIPTION = """\
Compare dense and mixture-of-experts language models at equal step time: moejax measures the step time of each model,
pairs dense and MoE models whose step times are equal, trains both for the same time, evaluates them, and plots accuracy
against speed."""

EXAMPLES = """\
examples:
  moejax compare quickstart --workdir /tmp/quickstart    run a complete comparison on a CPU, in minutes
  moejax show quick_small_8e                             show parameters, FLOPs, budget and all fields
  moejax train quick_small --workdir /tmp/small --model.num-layers 4 --training.steps 200
  moejax train mine.py:my_experiment --workdir /tmp/mine train a custom experiment
  moejax train /tmp/small/experiment.json --workdir /tmp/small --training.steps 400    train a finished run for longer
  moejax evaluate /tmp/small --tasks core_en --limit 100 run lm-evaluation-harness benchmarks
  moejax generate /tmp/small --prompt 'def main('         continue text
  moejax plan dense_6b4 --topology v5p:4x8x8             predict step time and memory on 256 chips

Any field can be set by its dotted path. `moejax train NAME --help` lists and explains all fields.
After an interruption (Ctrl-C, or even kill -9), run the same command again. It resumes from the latest checkpoint."""


NAME = "a listed name, FILE.py:FUNCTION, or RUN/experiment.json of an existing run"


WITHOUT_EXPERIMENT = ("list", "data", "tokenizer", "calibrate", "report", "fit", "check-claim")
"""Commands without an experiment."""


class _Parser(argparse.ArgumentParser):
  """A parser that raises UserError with a message of one line."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message}; see `{self.prog} --help`")


def path(text: str) -> pathlib.Path:
  """Parses a non-empty path. An empty path, as from an unset shell variable, would mean the current directory."""
  if not text.strip():
    raise argparse.ArgumentTypeError("the path is empty")
  return pathlib.Path(text)


def make_parser(chosen: str) -> argparse.ArgumentParser:
  """The parser of all commands. Only the chosen command has its options, because it alone is imported."""
  formatter = argparse.RawDescriptionHelpFormatter
  parser = _Parser("moejax", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=formatter)
  parser.add_argument("--version", action="version", version=f"moejax {moejax.__version__}")
  commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
  for name, (file, summary) in COMMANDS.items():
    of_command = commands.add_parser(
      name, help=summary, description=summary, formatter_class=formatter, add_help=False, allow_abbrev=False
    )
    if name == chosen:
      _add_options(of_command, name, importlib.import_module(f"moejax.commands.{file}"))
  return parser


def _add_options(parser: argparse.ArgumentParser, name: str, module: ModuleType) -> None:
  """Adds the options of a command, of which its module has most."""
  parser.set_defaults(command=name, verb=module.run, parser=parser, imports=[])
  parser.add_argument("-h", "--help", action="store_true", help="show this help and, if NAME is given, all its fields")
  if name not in WITHOUT_EXPERIMENT:
    parser.add_argument(
      "--import",
      type=path,
      action="append",
      metavar="FILE.py",
      dest="imports",
      help="Python file to import first, with custom routers, optimizers or other kinds that the experiment uses",
    )
  module.add_options(parser)
