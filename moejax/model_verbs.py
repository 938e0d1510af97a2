"""The commands for models that are trained or come from elsewhere: generate, import, export, upcycle."""

import argparse
import sys

from moejax import api
from moejax.display import Display
from moejax.errors import UserError
from moejax.files import write_whole
from moejax.overrides import override
from moejax.training.run_directory import check_only_operational, read_experiment
from moejax.verb_arguments import helped, no_overrides, prepare_files, required


def generate(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  directory = required(known, "run", "RUN")
  if (known.prompt is None) == (known.batch_file is None):
    raise UserError("generate needs either --prompt TEXT or --batch-file FILE; `moejax generate --help` explains")
  if known.out and not known.batch_file:
    raise UserError("--out is for the answers to --batch-file; a continuation of --prompt is printed")
  prepare_files(known, "out")
  there = read_experiment(directory)
  experiment = override(there, overrides)
  check_only_operational(there, experiment)
  from moejax.inference.batch_file import answers, read_requests
  from moejax.inference.sampling import Sampling
  from moejax.inference.text import Prompt, continue_texts

  sampling = Sampling(temperature=known.temperature, top_k=known.top_k, top_p=known.top_p, min_p=known.min_p)
  if known.batch_file:
    requests = read_requests(known.batch_file, known.max_tokens, known.stop)
    prompts = [request.prompt for request in requests]
    found = continue_texts(directory, prompts, sampling, known.seed, experiment, warn=_warn)
    lines = "".join(answers(requests, found))
    if known.out:
      write_whole(known.out, lines)
    else:
      print(lines, end="")
    return 0
  prompts = [Prompt(text=text, max_tokens=known.max_tokens, stop=tuple(known.stop)) for text in known.prompt]
  stream = _Stream() if len(prompts) == 1 else None
  for each in continue_texts(directory, prompts, sampling, known.seed, experiment, stream, _warn):
    print("" if stream else each.text)
    if each.prompt_cut:
      _warn("the prompt and --max-tokens do not fit the training length, so only the end of the prompt was seen")
  return 0


def import_run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  folder, directory = required(known, "folder", "HF_DIR"), required(known, "run", "RUN")
  from moejax.interop.huggingface import import_model, imported_experiment

  base = imported_experiment(folder, directory, known.load_balance, known.sequence_length)
  experiment = override(base, overrides)
  with Display(f"import {folder}") as display:
    import_model(folder, directory, experiment, display)
  print(
    f"{directory}: moejax generate {directory} --prompt TEXT, or moejax train {directory}/experiment.json "
    f"--workdir {directory}"
  )
  return 0


def upcycle_run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  run, directory = required(known, "run", "RUN"), required(known, "new", "NEW")
  required(known, "experts", "--experts N")
  from moejax.interop.upcycle import Upcycling, upcycle, upcycled_experiment

  fields = ("experts", "active", "granularity", "every", "noise", "seed")
  how = Upcycling(**{name: getattr(known, name) for name in fields})
  experiment = override(upcycled_experiment(read_experiment(run), directory, how, known.load_balance), overrides)
  with Display(f"upcycle {run}") as display:
    upcycle(run, directory, experiment, how, display)
  print(f"{directory}: moejax train {directory}/experiment.json --workdir {directory}")
  return 0


def export_run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  no_overrides(overrides)
  directory, folder = required(known, "run", "RUN"), required(known, "folder", "HF_DIR")
  with Display(f"export {directory}") as display:
    config = api.export_model(directory, folder, dtype=known.dtype, progress=display)
  print(f"{folder}: {config['architectures'][0]}")
  return 0


def _warn(text: str) -> None:
  print(f"moejax: warning: {text}", file=sys.stderr)


class _Stream:
  """Prints a continuation as it grows."""

  def __init__(self) -> None:
    self._shown = 0

  def __call__(self, index: int, text: str) -> None:
    print(text[self._shown :], end="", flush=True)
    self._shown = max(self._shown, len(text))
