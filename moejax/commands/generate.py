"""`moejax generate`: generate text with a trained model."""

import argparse
import sys

from moejax.command_line import path
from moejax.errors import UserError
from moejax.files import write_whole
from moejax.overrides import override
from moejax.training.run_directory import (
  check_only_operational,
  read_experiment,
)
from moejax.verb_arguments import add_sparse, helped, prepare_files, required

GENERATE = """\
RUN is the --workdir of `moejax train`, or a directory in runs/ of a comparison. Text is generated with the latest
checkpoint until the document ends, a stop string occurs, or --max-tokens is reached. Decoding is greedy unless
--temperature is above 0. Fields that do not affect the trained model can be set, as in --mesh.model 4.

Each line of a batch file is an object such as {"prompt": "...", "max_tokens": 64, "stop": ["\\n"]}. The output has the
same lines in the same order, with the fields text, tokens, finish_reason (stop or length) and prompt_cut added.

examples:
  moejax generate /tmp/small --prompt 'def main(' --max-tokens 100
  moejax generate /tmp/small --prompt 'import ' --temperature 0.8 --min-p 0.05 --stop $'\\n\\n' --seed 1
  moejax generate /tmp/small --batch-file prompts.jsonl --out answers.jsonl"""


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.epilog = GENERATE
  parser.add_argument("run", nargs="?", type=path, metavar="RUN", help="directory of a trained run")
  parser.add_argument(
    "--prompt", nargs="+", metavar="TEXT",
    help="text to continue; the continuation of a single prompt is printed as it is generated",
  )  # fmt: skip
  parser.add_argument("--batch-file", type=path, metavar="FILE", help="JSONL file with the prompts")
  parser.add_argument(
    "--out", type=path, metavar="FILE", help="JSONL file for the answers to --batch-file (default: standard output)"
  )
  parser.add_argument(
    "--max-tokens", type=int, default=64, metavar="N", help="maximum number of tokens to generate (default: 64)"
  )
  parser.add_argument(
    "--stop", nargs="+", default=(), metavar="TEXT", help="strings that end a continuation, which does not include them"
  )
  parser.add_argument(
    "--temperature", type=float, default=0.0, metavar="X",
    help="sampling temperature; 0 is greedy (default: 0)",
  )  # fmt: skip
  parser.add_argument("--top-k", type=int, metavar="N", help="sample from the N most probable tokens")
  parser.add_argument(
    "--top-p", type=float, metavar="P", help="sample from the most probable tokens with a total probability of P"
  )
  parser.add_argument(
    "--min-p", type=float, metavar="P", help="sample from tokens with at least P times the probability of the best one"
  )
  add_sparse(parser)
  parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed for sampling (default: 0)")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  directory = required(known, "run", "RUN")
  if (known.prompt is None) == (known.batch_file is None):
    raise UserError("generate needs either --prompt TEXT or --batch-file FILE; see `moejax generate --help`")
  if known.out and not known.batch_file:
    raise UserError("--out requires --batch-file; remove it, because continuations of --prompt are printed")
  prepare_files(known, "out")
  there = read_experiment(directory)
  experiment = override(there, overrides)
  check_only_operational(there, experiment)
  from moejax.inference.batch_file import answers, read_requests
  from moejax.inference.sampling import Sampling
  from moejax.inference.sparse import parse_sparse
  from moejax.inference.text import Prompt, continue_texts

  sampling = Sampling(temperature=known.temperature, top_k=known.top_k, top_p=known.top_p, min_p=known.min_p)
  sparse = None if known.sparse is None else parse_sparse(known.sparse)
  if known.batch_file:
    requests = read_requests(known.batch_file, known.max_tokens, known.stop, experiment.data.sequence_length)
    prompts = [request.prompt for request in requests]
    found = continue_texts(directory, prompts, sampling, known.seed, experiment, warn=_warn, sparse=sparse)
    lines = "".join(answers(requests, found))
    if known.out:
      write_whole(known.out, lines)
    else:
      print(lines, end="")
    return 0
  prompts = [Prompt(text=text, max_tokens=known.max_tokens, stop=tuple(known.stop)) for text in known.prompt]
  stream = _Stream() if len(prompts) == 1 else None
  for each in continue_texts(directory, prompts, sampling, known.seed, experiment, stream, _warn, sparse):
    print("" if stream else each.text)
    if each.prompt_cut:
      _warn("the prompt and --max-tokens do not fit in the training length, so the prompt was truncated from the left")
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
