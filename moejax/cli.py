"""The commands: parse, call, print. What needs JAX is imported by the verb that needs it, so that the rest is quick."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

from rich.console import Console

import moejax
from moejax import describe, interrupts, lookup
from moejax.config.experiment import Evaluation, Experiment, Pair
from moejax.config.plain import to_plain
from moejax.display import Display
from moejax.errors import UserError, users_mistake
from moejax.optional import library
from moejax.overrides import override, override_pair, print_field_help
from moejax.training.run_directory import (
  COMPARISON,
  RUN,
  check_json,
  check_only_operational,
  prepare_file,
  read_experiment,
)

USERS_MISTAKE = 2
DOES_NOT_FIT = 3

DESCRIPTION = """\
Dense or mixture-of-experts? moejax answers in step time: it measures the step of each model, pairs dense and MoE at
equal step time, gives each pair the same training time, trains, evaluates, and draws the speed-accuracy curve."""

EXAMPLES = """\
examples:
  moejax compare quickstart --workdir /tmp/quickstart    the whole answer on the CPU at hand, in minutes
  moejax show quick_small_8e                             parameters, FLOPs, budget and every field
  moejax train quick_small --workdir /tmp/small --model.num-layers 4 --training.steps 200
  moejax train mine.py:my_experiment --workdir /tmp/mine an experiment of your own
  moejax evaluate /tmp/small --tasks core_en --limit 100 benchmarks of lm-evaluation-harness
  moejax plan dense_6b4 --topology v5p:4x8x8             step time and memory on 256 chips, without them

Every field is set by its dotted path; `moejax train NAME --help` lists them with what they mean.
Interrupt a run (Ctrl-C, or even kill -9) and give the same command again: it goes on where it was."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
  """Runs one command and raises SystemExit with its exit code, which the README lists.

  It can be called from Python: it does not replace the process and leaves signal handlers as they were. The console
  command is `moejax.__main__`.

  Raises:
    SystemExit: always, unless there is a bug, which is any other exception.
  """
  interrupts.forget()
  try:
    known, overrides = _parser().parse_known_args(arguments)
    code = known.verb(known, overrides)
    sys.stdout.flush()
  except (Exception, KeyboardInterrupt) as error:
    # A library may have turned the exception of a signal into another one.
    if interrupts.received() or isinstance(error, KeyboardInterrupt):
      interrupts.leave()
    mistake = users_mistake(error)
    if mistake is None and not isinstance(error, FloatingPointError):
      raise
    print(f"moejax: {mistake or error}", file=sys.stderr)
    code = 1 if mistake is None else USERS_MISTAKE
  sys.exit(code)


class _Parser(argparse.ArgumentParser):
  """A parser whose errors are one line."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message}; `{self.prog} --help` explains")


def _parser() -> argparse.ArgumentParser:
  formatter = argparse.RawDescriptionHelpFormatter
  parser = _Parser("moejax", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=formatter)
  parser.add_argument("--version", action="version", version=f"moejax {moejax.__version__}")
  verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

  def verb(name: str, run: Callable[[argparse.Namespace, list[str]], int], summary: str) -> argparse.ArgumentParser:
    of_verb = verbs.add_parser(
      name, help=summary, description=summary, formatter_class=formatter, add_help=False, allow_abbrev=False
    )
    of_verb.set_defaults(verb=run, parser=of_verb)
    of_verb.add_argument("-h", "--help", action="store_true", help="what this command does, and NAME's fields")
    return of_verb

  verb("list", _list, "List all experiments and suites.")
  show = verb("show", _show, "Show an experiment or a suite: parameters, FLOPs, budget, every field.")
  show.add_argument("name", nargs="?", metavar="NAME", help="a listed name, or path/to/file.py:function")
  show.add_argument("--json", action="store_true", help="print JSON")
  train = verb("train", _train, "Train one experiment and evaluate it on held-out text; goes on where it stopped.")
  train.add_argument("name", nargs="?", metavar="NAME", help="a listed name, or path/to/file.py:function")
  train.add_argument("--workdir", type=pathlib.Path, metavar="DIR", help="where checkpoints, metrics and results go")
  compare = verb(
    "compare", _compare, "Compare dense and MoE at equal step time, from measuring to the report; goes on too."
  )
  compare.add_argument("name", nargs="?", metavar="SUITE", help="a listed suite, or path/to/file.py:function")
  compare.add_argument("--workdir", type=pathlib.Path, metavar="DIR", help="where runs, numbers and the report go")
  _add_evaluate(verb("evaluate", _evaluate, "Run lm-evaluation-harness benchmarks on a trained model (resumable)."))
  data = verb("data", _data, "Tokenise text once into shards that any number of runs and hosts read; goes on too.")
  data.add_argument("action", nargs="?", choices=("pack",), help="pack: text into a folder for data.train")
  _add_text(data)
  data.add_argument("--tokenizer", default="bytes", metavar="NAME", help="as data.tokenizer; bytes by default")
  data.add_argument("--out", type=pathlib.Path, metavar="DIR", help="the folder that is written")
  data.add_argument("--keep", choices=("all", "train", "validation"), default="all", help="one side of the hash split")
  data.add_argument("--validation-fraction", type=float, default=0.05, metavar="F", help="as data.validation_fraction")
  data.add_argument("--deduplicate", action="store_true", help="pack only the first of documents with the same text")
  data.add_argument("--document-length", type=int, metavar="N", help="as data.document_length")
  data.add_argument("--processes", type=int, metavar="N", help="that tokenise; one for each core by default")
  data.add_argument("--shard-tokens", type=int, default=2**25, metavar="N", help="tokens in a shard")
  tokenizer = verb("tokenizer", _tokenizer, "Train a byte-level BPE tokenizer on text.")
  tokenizer.add_argument("action", nargs="?", choices=("train",), help="train: write a tokenizer.json")
  _add_text(tokenizer)
  tokenizer.add_argument("--vocab-size", type=int, default=32_768, metavar="N", help="ids, specials included")
  tokenizer.add_argument("--out", type=pathlib.Path, metavar="FILE", help="the .json file that is written")
  plan = verb("plan", _plan, "Predict step time and memory of an experiment on a pod that need not be there.")
  plan.add_argument("name", nargs="?", metavar="NAME", help="a listed name, or path/to/file.py:function")
  _add_topology(plan)
  plan.add_argument("--search", action="store_true", help="try meshes, remat, accumulation and dispatch; goes on too")
  plan.add_argument("--tries", type=int, default=8, metavar="N", help="variants that a search compiles (default 8)")
  plan.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write every number there too")
  plan.add_argument("--html", type=pathlib.Path, metavar="FILE", help="write the page there too")
  match = verb("match", _match, "Find the MoE that takes a dense model's step time on a pod that need not be there.")
  match.add_argument("dense", nargs="?", metavar="DENSE", help="a listed dense experiment, or path/to/file.py:function")
  match.add_argument(
    "name", nargs="?", metavar="MOE", help="the MoE, whose `free` fields are varied; --dense.PATH sets DENSE's"
  )
  _add_topology(match)
  match.add_argument("--tolerance", type=float, default=0.05, metavar="X", help="relative difference that is equal")
  match.add_argument("--out", type=pathlib.Path, metavar="FILE", help="the matched experiment (MOE_matched.py)")
  report = verb("report", _report, "Write the report of a comparison directory again.")
  report.add_argument("workdir", nargs="?", type=pathlib.Path, metavar="DIR", help="the --workdir of a comparison")
  return parser


EVALUATE = """\
RUN is the --workdir of `moejax train`, or a member in runs/ of a comparison. Its latest checkpoint is evaluated, and
the scores are written to RUN/results.json. Options such as --mesh.data 4 and --evaluation.batch-size 32 may follow.

examples:
  moejax evaluate /tmp/small --tasks core_en --limit 100
  moejax evaluate /tmp/small --tasks arc_easy mmlu_stem 'blimp_*' --data DIR
  moejax evaluate /tmp/small --tasks gsm8k_cot --few-shot 4 --gen-kwargs max_gen_toks=128 --log-samples"""


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
  evaluate.epilog = EVALUATE
  evaluate.add_argument("run", nargs="?", type=pathlib.Path, metavar="RUN", help="directory of a trained run")
  evaluate.add_argument(
    "--tasks", nargs="+", metavar="TASK",
    help="the suite core_en (14 benchmarks), or tasks, groups, tags and patterns of lm-evaluation-harness, which "
    "`lm-eval ls tasks` lists; default: the run's evaluation.tasks, and an error where it has none",
  )  # fmt: skip
  evaluate.add_argument("--limit", type=int, metavar="N", help="use the first N examples of each task (default: all)")
  evaluate.add_argument(
    "--data", type=pathlib.Path, metavar="DIR",
    help="read the tasks' data from DIR/TASK/SPLIT.jsonl (default: from the Hugging Face hub or its cache)",
  )  # fmt: skip
  evaluate.add_argument(
    "--few-shot", type=int, metavar="N", help="examples in each prompt (default: as the suite or the task says)"
  )
  evaluate.add_argument(
    "--include-path", type=pathlib.Path, metavar="DIR",
    help="folder with your own task YAML files; one that has the name of a task of the harness replaces it",
  )  # fmt: skip
  evaluate.add_argument(
    "--gen-kwargs", metavar="KEY=VALUE,...",
    help="override generation options of the tasks: max_gen_toks, until, do_sample, temperature, top_k, top_p",
  )  # fmt: skip
  evaluate.add_argument(
    "--log-samples", action="store_true",
    help="write every example with its prompts and the model's answers to RUN/evaluation/samples/TASK.jsonl",
  )  # fmt: skip


def _add_text(verb: argparse.ArgumentParser) -> None:
  verb.add_argument("--source", nargs="+", action="extend", metavar="SOURCE", help="text, as in data.train")
  verb.add_argument("--text-field", default="text", metavar="NAME", help="as data.text_field")


def _add_topology(parser: argparse.ArgumentParser) -> None:
  known = "v4:8x8x8, v5e:16x16, v5p:4x8x8, v6e:16x16, tpu7x:4x4x8, gpu:h100:8, cpu:8"
  parser.add_argument("--topology", metavar="NAME", help=f"chips and how they are joined, such as {known}")
  parser.add_argument("--slices", type=int, default=1, metavar="N", help="slices of that topology, joined by DCN")


def _list(known: argparse.Namespace, overrides: list[str]) -> int:
  if not _helped(known):
    _no_overrides(overrides)
    Console().print(describe.list_page(lookup.listed()))
  return 0


def _show(known: argparse.Namespace, overrides: list[str]) -> int:
  if _helped(known):
    return 0
  found = override(lookup.find(_required(known, "name", "NAME")), overrides)
  if known.json:
    print(json.dumps(describe.facts(found) if isinstance(found, Experiment) else describe.suite_facts(found), indent=2))
  else:
    page = describe.experiment_page(found) if isinstance(found, Experiment) else describe.suite_page(found)
    Console().print(page, soft_wrap=True)
  return 0


def _train(known: argparse.Namespace, overrides: list[str]) -> int:
  if _helped(known):
    return 0
  experiment = override(lookup.find_experiment(_required(known, "name", "NAME")), overrides)
  directory = _required(known, "workdir", "--workdir DIR")
  check_data(experiment)
  check_json(directory, RUN, to_plain(experiment), unknown=("steps",))
  ask = import_harness(experiment.evaluation).make_task_evaluator if experiment.evaluation.tasks else None
  from moejax.evaluation.run import train_and_evaluate

  with Display(f"train {experiment.name}") as display:
    summary = train_and_evaluate(experiment, directory, display, ask)
  Console().print(describe.summary_page(summary))
  return 0


def _compare(known: argparse.Namespace, overrides: list[str]) -> int:
  if _helped(known):
    return 0
  suite = override(lookup.find_suite(_required(known, "name", "SUITE")), overrides)
  directory = _required(known, "workdir", "--workdir DIR")
  for member in suite.members:
    check_data(member)
  check_json(directory, COMPARISON, to_plain(suite))
  evaluation = suite.members[0].evaluation
  ask = import_harness(evaluation).make_task_evaluator if evaluation.tasks else None
  from moejax.comparison.run import compare
  from moejax.comparison.table import terminal_table

  with Display(f"compare {suite.name}") as display:
    comparison = compare(suite, directory, display, ask)
  console = Console()
  console.print(terminal_table(comparison))
  console.print(comparison["finding"], highlight=False, markup=False)
  return 0


def _evaluate(known: argparse.Namespace, overrides: list[str]) -> int:
  if _helped(known):
    return 0
  directory = _required(known, "run", "RUN")
  there = read_experiment(directory)
  # The limit is that of the loop, which must not wait long: the command asks all examples.
  there = dataclasses.replace(there, evaluation=dataclasses.replace(there.evaluation, task_limit=None))
  experiment = override(there, overrides)
  check_only_operational(there, experiment)
  given = {
    "tasks": known.tasks and tuple(known.tasks),
    "task_limit": known.limit,
    "task_data": known.data and str(known.data),
  }
  given = {name: value for name, value in given.items() if value is not None}
  evaluation = dataclasses.replace(experiment.evaluation, **given)
  harness = import_harness(evaluation)
  from moejax.evaluation.tasks import asked, headlines

  more = {
    "few_shot": known.few_shot,
    "include_path": known.include_path,
    "gen_kwargs": harness.parse_gen_kwargs(known.gen_kwargs) if known.gen_kwargs else {},
  }
  request = harness.make_request(evaluation, **more)
  with Display(f"evaluate {experiment.name}") as display:
    results = harness.evaluate_run(directory, experiment, request, display, known.log_samples)
  Console().print(describe.scores_page(headlines(results, asked(results)), results))
  return 0


def import_harness(evaluation: Evaluation) -> ModuleType:
  """moejax.evaluation.harness, told to leave progress to us, and to fetch nothing where the tasks' data is at hand.

  Raises:
    UserError: lm-evaluation-harness is not installed.
  """
  # Read when they are imported, which others do too: so this comes before any other import of a verb.
  os.environ.setdefault("TQDM_DISABLE", "1")
  os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
  if evaluation.task_data is not None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
  # It would fork this process, whose JAX threads a child does not have.
  os.environ.setdefault("DISABLE_MULTIPROC", "1")
  library("lm_eval", "eval")
  from moejax.evaluation import harness

  return harness


def _data(known: argparse.Namespace, overrides: list[str]) -> int:
  if _helped(known):
    return 0
  _no_overrides(overrides)
  _required(known, "action", "pack")
  sources, out = _required(known, "source", "--source SOURCE"), _required(known, "out", "--out DIR")
  from moejax.data.documents import Reading
  from moejax.data.pack import pack
  from moejax.data.tokenizers import padded_vocab_size

  with Display(f"pack {out}") as display:
    manifest = pack(
      sources,
      known.tokenizer,
      out,
      reading=Reading(known.text_field, known.document_length),
      keep=known.keep,
      validation_fraction=known.validation_fraction,
      deduplicate=known.deduplicate,
      processes=known.processes,
      shard_tokens=known.shard_tokens,
      progress=_shown(display, "text: reading and tokenising"),
      warn=lambda text: display.note(f"warning: {text}"),
    )
  print(
    f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, {manifest['text_bytes']:,} bytes of "
    f"text in {len(manifest['shards'])} shards; --model.vocab-size {padded_vocab_size(manifest['vocab_size'])} fits"
  )
  return 0


def _shown(display: Display, stage: str) -> Callable[[str, float], None]:
  """Shows progress from its first call on, so that what is refused before is one line."""
  begun = False

  def show(what: str, done: float) -> None:
    nonlocal begun
    if not begun:
      begun = True
      display.stage(stage, total=1.0)
    display.advance(done, what)

  return show


def _tokenizer(known: argparse.Namespace, overrides: list[str]) -> int:
  if _helped(known):
    return 0
  _no_overrides(overrides)
  _required(known, "action", "train")
  sources, out = _required(known, "source", "--source SOURCE"), _required(known, "out", "--out FILE")
  _prepare_files(known, "out")
  from moejax.data.tokenizer_training import train_tokenizer
  from moejax.data.tokenizers import padded_vocab_size

  with Display(f"tokenizer {out}") as display:
    size = train_tokenizer(
      sources,
      known.vocab_size,
      out,
      text_field=known.text_field,
      progress=_shown(display, "text: reading"),
    )
  print(f"{out}: {size:,} ids; --data.tokenizer {out} --model.vocab-size {padded_vocab_size(size)}")
  return 0


def _plan(known: argparse.Namespace, overrides: list[str]) -> int:
  if _helped(known):
    return 0
  experiment = override(lookup.find_experiment(_required(known, "name", "NAME")), overrides)
  topology = _topology(known)
  _prepare_files(known, "json", "html")
  if known.search and known.html:
    raise UserError("--html shows one plan and --search makes many; leave one out")
  if known.search:
    return _search(known, experiment, topology)
  from moejax.planning.hints import hints
  from moejax.planning.page import plan_html, plan_page
  from moejax.planning.plan import plan

  with Display(f"plan {experiment.name}") as display:
    planned = plan(experiment, topology, display)
  Console().print(plan_page(planned), soft_wrap=True)
  if known.json:
    known.json.write_text(json.dumps(planned.to_json() | {"hints": hints(planned)}, indent=2) + "\n")
  if known.html:
    known.html.write_text(plan_html(planned))
  return 0 if planned.fits else DOES_NOT_FIT


def _search(known: argparse.Namespace, experiment: Experiment, topology: Any) -> int:
  from moejax.planning.search import search, search_page

  with Display(f"search {experiment.name}") as display:
    tried = search(experiment, topology, known.tries, display)
  Console().print(search_page(tried), soft_wrap=True)
  if known.json:
    known.json.write_text(json.dumps([found.to_json() for found in tried], indent=2) + "\n")
  return 0 if tried[0].plan.fits else DOES_NOT_FIT


def _match(known: argparse.Namespace, overrides: list[str]) -> int:
  if _helped(known):
    return 0
  dense = lookup.find_experiment(_required(known, "dense", "DENSE"))
  dense, moe = override_pair(dense, lookup.find_experiment(_required(known, "name", "MOE")), overrides)
  pair = Pair(dense=dense, candidates=(moe,))
  topology = _topology(known)
  _prepare_files(known, "out")
  from moejax.comparison.pod_match import experiment_file, match_on_pod, match_page

  with Display(f"match {dense.name}") as display:
    found = match_on_pod(pair, topology, known.tolerance, display)
  Console().print(match_page(found))
  path = known.out or pathlib.Path(f"{moe.name}_matched.py")
  path.write_text(experiment_file(found.experiment))
  print(f"{path}: moejax train {path}:matched --workdir DIR")
  return 0


def _report(known: argparse.Namespace, overrides: list[str]) -> int:
  if _helped(known):
    return 0
  _no_overrides(overrides)
  directory = _required(known, "workdir", "DIR")
  from moejax.comparison.report import write_report

  print(write_report(directory))
  return 0


def _topology(known: argparse.Namespace) -> Any:
  """The topology that was named, and the environment for it, which JAX and libtpu read when they are imported."""
  from moejax.planning.topology import parse_topology, prepare_environment

  topology = parse_topology(_required(known, "topology", "--topology NAME"), known.slices)
  prepare_environment(topology)
  return topology


def _prepare_files(known: argparse.Namespace, *options: str) -> None:
  """Raises UserError where a file of these options cannot be written, before the work that it is for."""
  for option in options:
    if (path := getattr(known, option)) is not None:
      prepare_file(path, f"--{option}")


def check_data(experiment: Experiment) -> None:
  """Raises UserError where the experiment's text or tokenizer is missing, empty or of no known kind."""
  from moejax.data.sources import check_sources
  from moejax.data.tokenizers import make_tokenizer

  make_tokenizer(experiment.data.tokenizer)
  check_sources(experiment.data)


def _helped(known: argparse.Namespace) -> bool:
  """Prints the help that was asked for: the command's, and the fields of the experiment that was named."""
  if not known.help:
    return False
  print(known.parser.format_help())
  name = getattr(known, "name", None)
  if name is not None:
    print_field_help(lookup.find(name), f"{known.parser.prog} {name}")
  elif hasattr(known, "name"):
    print("Give NAME too and all its fields are listed, with what they mean. `moejax list` shows the names.")
  return True


def _required(known: argparse.Namespace, attribute: str, shown: str) -> Any:
  value = getattr(known, attribute)
  if value is None:
    raise UserError(f"{known.parser.prog.removeprefix('moejax ')} needs {shown}; `{known.parser.prog} --help` explains")
  return value


def _no_overrides(overrides: list[str]) -> None:
  if overrides:
    raise UserError(f"unexpected {' '.join(overrides)}; this command sets no fields")
