"""Implements the commands. A command imports JAX only if it needs it, so that the others start fast."""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from rich.console import Group
from rich.text import Text

from moejax import api, interrupts, lookup, model_verbs, processes
from moejax.command_line import TRIES, make_parser
from moejax.config.experiment import Experiment
from moejax.display import Display, make_display
from moejax.errors import Failure, UserError, reason, users_mistake
from moejax.files import finite, write_json, write_whole
from moejax.overrides import override, override_pair
from moejax.terminal import output
from moejax.training.run_directory import (
  check_only_operational,
  read_experiment,
)
from moejax.user_files import failure_of_users_code
from moejax.verb_arguments import helped, no_overrides, prepare_files, required

USERS_MISTAKE = 2
DOES_NOT_FIT = 3


def main(arguments: Sequence[str] | None = None) -> NoReturn:
  """Runs one command and raises SystemExit with its exit code. The README lists the exit codes.

  It can be called from Python: unlike the console command (`moejax.__main__`), it does not restart the process, and it
  restores signal handlers.

  Raises:
    SystemExit: When the command is done. Any other exception is a bug.
  """
  interrupts.forget()
  try:
    known, overrides = make_parser(VERBS).parse_known_args(arguments)
    for file in known.imports:
      lookup.import_file(str(file))
    code = known.verb(known, overrides)
    sys.stdout.flush()
  except (Exception, KeyboardInterrupt) as error:
    # A library may have replaced the exception that a signal raised.
    if interrupts.received() or isinstance(error, KeyboardInterrupt):
      interrupts.leave()
    failure = isinstance(error, Failure | FloatingPointError)
    mistake = None if failure else users_mistake(error)
    of_user = None if failure or isinstance(error, UserError) else failure_of_users_code(error)
    if of_user is not None:
      frames, line = of_user
      print(f"{frames}moejax: {line}", file=sys.stderr)
      processes.fail(1, line)
      sys.exit(1)
    if mistake is None and not failure:
      processes.await_failure_report()
      processes.fail(1, f"{type(error).__name__}: {reason(error)}")
      raise
    print(f"moejax: {mistake or error}", file=sys.stderr)
    code = 1 if mistake is None else USERS_MISTAKE
    processes.fail(code, mistake or str(error))
  sys.exit(code)


def _list(known: argparse.Namespace, overrides: list[str]) -> int:
  if not helped(known):
    no_overrides(overrides)
    from moejax import describe

    output().print(describe.list_page(lookup.listed()), soft_wrap=True)
  return 0


def _show(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  found = override(lookup.find(required(known, "name", "NAME")), overrides)
  from moejax import describe

  if known.json:
    facts = describe.facts(found) if isinstance(found, Experiment) else describe.suite_facts(found)
    print(json.dumps(finite(facts), indent=2, allow_nan=False))
  else:
    page = describe.experiment_page(found) if isinstance(found, Experiment) else describe.suite_page(found)
    output().print(page, soft_wrap=True)
  return 0


def _train(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  experiment = override(lookup.find_experiment(required(known, "name", "NAME")), overrides)
  directory = required(known, "workdir", "--workdir DIR")
  api.join()
  with make_display(f"train {experiment.name}") as progress:
    trained = api.train(experiment, directory, progress=progress)
  if processes.is_first():
    output().print(trained, soft_wrap=True)
  return 0


def _compare(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  suite = override(lookup.find_suite(required(known, "name", "SUITE")), overrides)
  directory = required(known, "workdir", "--workdir DIR")
  api.join()
  with make_display(f"compare {suite.name}") as progress:
    compared = api.compare(suite, directory, progress=progress)
  if not processes.is_first():
    return 0
  from moejax.comparison.table import terminal_table

  console = output()
  console.print(terminal_table(compared.comparison), soft_wrap=True)
  console.print(compared.finding, highlight=False, markup=False)
  return 0


def _evaluate(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  directory = required(known, "run", "RUN")
  there = read_experiment(directory)
  # evaluation.task_limit applies to evaluation during training, which should be short. The command uses all examples.
  there = dataclasses.replace(there, evaluation=dataclasses.replace(there.evaluation, task_limit=None))
  experiment = override(there, overrides)
  check_only_operational(there, experiment)
  api.join()
  with make_display(f"evaluate {experiment.name}") as progress:
    evaluated = api.evaluate(
      directory,
      known.tasks or (),
      limit=known.limit,
      few_shot=known.few_shot,
      data=known.data,
      include_path=known.include_path,
      gen_kwargs=known.gen_kwargs,
      log_samples=known.log_samples,
      experiment=experiment,
      progress=progress,
    )
  from moejax import describe

  if processes.is_first():
    output().print(describe.scores_page(evaluated.scores, evaluated.results), soft_wrap=True)
  return 0


def _data(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  no_overrides(overrides)
  required(known, "action", "pack")
  sources, out = required(known, "source", "--source SOURCE"), required(known, "out", "--out DIR")
  if known.validation_fraction is not None and known.keep == "all":
    raise UserError("--validation-fraction has no effect with --keep all; add --keep train or --keep validation")
  from moejax.config.data import Data
  from moejax.data.documents import Reading
  from moejax.data.pack import pack
  from moejax.data.tokenizers import padded_vocab_size

  with Display(f"pack {out}") as display:
    manifest = pack(
      sources,
      known.tokenizer,
      out,
      reading=Reading(known.text_field, known.document_length, known.on_error),
      keep=known.keep,
      validation_fraction=Data.validation_fraction if known.validation_fraction is None else known.validation_fraction,
      deduplicate=known.deduplicate,
      processes=known.processes,
      shard_tokens=known.shard_tokens,
      progress=_stage(display, "text: reading and tokenizing"),
      warn=lambda text: display.note(f"warning: {text}"),
    )
  print(
    f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, {manifest['text_bytes']:,} bytes of "
    f"text in {len(manifest['shards'])} shards; use --model.vocab-size {padded_vocab_size(manifest['vocab_size'])}"
  )
  return 0


def _stage(display: Display, name: str) -> Callable[[str, float], None]:
  """Returns a function that reports progress. Its first call starts the stage."""
  begun = False

  def show(what: str, done: float) -> None:
    nonlocal begun
    if not begun:
      begun = True
      display.stage(name, total=1.0)
    display.advance(done, what)

  return show


def _tokenizer(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  no_overrides(overrides)
  required(known, "action", "train")
  sources, out = required(known, "source", "--source SOURCE"), required(known, "out", "--out FILE")
  prepare_files(known, "out")
  from moejax.data.tokenizer_training import train_tokenizer
  from moejax.data.tokenizers import padded_vocab_size

  with Display(f"tokenizer {out}") as display:
    size = train_tokenizer(
      sources,
      known.vocab_size,
      out,
      text_field=known.text_field,
      on_error=known.on_error,
      progress=_stage(display, "text: reading"),
      warn=lambda text: display.note(f"warning: {text}"),
    )
  print(f"{out}: {size:,} tokens; use --data.tokenizer {out} --model.vocab-size {padded_vocab_size(size)}")
  return 0


def _plan(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  name, topology = required(known, "name", "NAME"), required(known, "topology", "--topology NAME")
  experiment, missing = _planned(known, name, topology)
  prepare_files(known, "json", "html", *(["calibration"] if known.against else []))
  for option, given in (("--search", known.search), (f"two experiments ({known.other})", known.other)):
    if known.against and given:
      raise UserError(f"--against is for the plan of one experiment, not for {option}; leave one of them out")
  if known.tries is not None and not known.search:
    raise UserError("--tries has no effect without --search; add --search, or remove --tries")
  if known.other is not None:
    return _beside(known, experiment, topology, overrides)
  experiment = override(experiment, overrides)
  if known.search:
    return _search(known, experiment, topology)
  described = api.described_topology(topology, known.slices, known.calibration, to_record=known.against is not None)
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
  check_offload(known.offload, described.chip)
  check_precisions(known.precision, described)
  with Display(f"plan {experiment.name}") as display:
    loaded = plan_loads(experiment, described, known.load, display) if known.load else []
    compiled = compile_step(experiment, described, display)
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
      api.plan(each, topology, slices=known.slices, calibration=known.calibration, progress=display)
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
    devices = api.described_topology(topology, known.slices).devices
    return foreign_experiment(name, devices, tuple(known.without))
  if known.without:
    raise UserError(
      "--without applies only to hf: and maxtext: configurations; set the fields of an experiment instead"
    )
  return lookup.find_experiment(name), {}


def _search(known: argparse.Namespace, experiment: Experiment, topology: str) -> int:
  described = api.described_topology(topology, known.slices, known.calibration)
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


def _match(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  dense = lookup.find_experiment(required(known, "dense", "DENSE"))
  dense, moe = override_pair(dense, lookup.find_experiment(required(known, "name", "MOE")), overrides)
  topology = required(known, "topology", "--topology NAME")
  prepare_files(known, "out")
  with Display(f"match {dense.name}") as display:
    found = api.match(
      dense, moe, topology, slices=known.slices, tolerance=known.tolerance, calibration=known.calibration,
      progress=display,
    )  # fmt: skip
  from moejax.comparison.pod_match import experiment_file, match_page

  output().print(match_page(found))
  path = known.out or pathlib.Path(f"{moe.name}_matched.py")
  write_whole(path, experiment_file(found.experiment))
  print(f"{path}: moejax train {path}:matched --workdir DIR")
  return 0


def _calibrate(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  no_overrides(overrides)
  file = required(known, "out", "--out FILE")
  prepare_files(known, "out")
  with Display("calibrate") as display:
    found = api.calibrate(file, progress=display)
  from moejax.planning.page import calibration_page

  output().print(calibration_page(found), soft_wrap=True)
  return 0


def _report(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  no_overrides(overrides)
  directory = required(known, "workdir", "DIR")
  from moejax.comparison.report import write_report

  print(write_report(directory))
  return 0


VERBS = {
  "list": _list,
  "show": _show,
  "train": _train,
  "compare": _compare,
  "evaluate": _evaluate,
  "generate": model_verbs.generate,
  "import": model_verbs.import_run,
  "export": model_verbs.export_run,
  "upcycle": model_verbs.upcycle_run,
  "data": _data,
  "tokenizer": _tokenizer,
  "plan": _plan,
  "match": _match,
  "calibrate": _calibrate,
  "report": _report,
}
"""The function of each command."""
