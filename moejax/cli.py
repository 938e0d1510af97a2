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

from moejax import describe, interrupts, lookup
from moejax.command_line import make_parser
from moejax.config.experiment import Evaluation, Experiment, Pair
from moejax.config.plain import to_plain
from moejax.display import Display
from moejax.errors import UserError, users_mistake
from moejax.optional import library
from moejax.overrides import override, override_pair, print_field_help
from moejax.terminal import output
from moejax.training.run_directory import (
  COMPARISON,
  check_json,
  check_only_operational,
  check_run,
  finite,
  prepare_file,
  read_experiment,
)

USERS_MISTAKE = 2
DOES_NOT_FIT = 3


def main(arguments: Sequence[str] | None = None) -> NoReturn:
  """Runs one command and raises SystemExit with its exit code, which the README lists.

  It can be called from Python: it does not replace the process and leaves signal handlers as they were. The console
  command is `moejax.__main__`.

  Raises:
    SystemExit: always, unless there is a bug, which is any other exception.
  """
  interrupts.forget()
  try:
    known, overrides = make_parser(VERBS).parse_known_args(arguments)
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


def _list(known: argparse.Namespace, overrides: list[str]) -> int:
  if not _helped(known):
    _no_overrides(overrides)
    output().print(describe.list_page(lookup.listed()), soft_wrap=True)
  return 0


def _show(known: argparse.Namespace, overrides: list[str]) -> int:
  if _helped(known):
    return 0
  found = override(lookup.find(_required(known, "name", "NAME")), overrides)
  if known.json:
    print(json.dumps(describe.facts(found) if isinstance(found, Experiment) else describe.suite_facts(found), indent=2))
  else:
    page = describe.experiment_page(found) if isinstance(found, Experiment) else describe.suite_page(found)
    output().print(page, soft_wrap=True)
  return 0


def _train(known: argparse.Namespace, overrides: list[str]) -> int:
  if _helped(known):
    return 0
  experiment = override(lookup.find_experiment(_required(known, "name", "NAME")), overrides)
  directory = _required(known, "workdir", "--workdir DIR")
  check_data(experiment)
  check_run(directory, experiment, experiment.training.steps)
  ask = import_harness(experiment.evaluation).make_task_evaluator if experiment.evaluation.tasks else None
  from moejax.evaluation.run import train_and_evaluate

  with Display(f"train {experiment.name}") as display:
    summary = train_and_evaluate(experiment, directory, display, ask)
  output().print(describe.summary_page(summary), soft_wrap=True)
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
  console = output()
  console.print(terminal_table(comparison), soft_wrap=True)
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
  output().print(describe.scores_page(headlines(results, asked(results)), results), soft_wrap=True)
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
  output().print(plan_page(planned), soft_wrap=True)
  if known.json:
    known.json.write_text(json.dumps(finite(planned.to_json() | {"hints": hints(planned)}), indent=2) + "\n")
  if known.html:
    known.html.write_text(plan_html(planned))
  return 0 if planned.fits else DOES_NOT_FIT


def _search(known: argparse.Namespace, experiment: Experiment, topology: Any) -> int:
  from moejax.planning.search import search, search_page

  with Display(f"search {experiment.name}") as display:
    tried = search(experiment, topology, known.tries, display)
  output().print(search_page(tried), soft_wrap=True)
  if known.json:
    known.json.write_text(json.dumps(finite([found.to_json() for found in tried]), indent=2) + "\n")
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
  output().print(match_page(found))
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
    print("Add NAME to list all its fields with their meaning; `moejax list` shows the names.")
  return True


def _required(known: argparse.Namespace, attribute: str, shown: str) -> Any:
  value = getattr(known, attribute)
  if value is None:
    raise UserError(f"{known.parser.prog.removeprefix('moejax ')} needs {shown}; `{known.parser.prog} --help` explains")
  return value


def _no_overrides(overrides: list[str]) -> None:
  if overrides:
    raise UserError(f"unexpected {' '.join(overrides)}; this command sets no fields")


VERBS = {
  "list": _list,
  "show": _show,
  "train": _train,
  "compare": _compare,
  "evaluate": _evaluate,
  "data": _data,
  "tokenizer": _tokenizer,
  "plan": _plan,
  "match": _match,
  "report": _report,
}
"""What runs each command."""
