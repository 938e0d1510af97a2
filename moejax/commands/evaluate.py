"""`moejax evaluate`: run lm-evaluation-harness benchmarks on a trained model."""

import argparse
import dataclasses

from moejax import api, processes
from moejax.command_line import path
from moejax.display import make_display
from moejax.overrides import override
from moejax.terminal import output
from moejax.training.run_directory import (
  check_only_operational,
  read_experiment,
)
from moejax.verb_arguments import add_sparse, helped, required

EVALUATE = """\
RUN is the --workdir of `moejax train`, or a directory in runs/ of a comparison. The latest checkpoint is evaluated, and
scores are written to RUN/results.json (with --sparse, to a folder in RUN/sparse). Fields that do not affect the trained
model can be set, as in --mesh.data 4 and --evaluation.batch-size 32.

examples:
  moejax evaluate /tmp/small --tasks core_en --limit 100
  moejax evaluate /tmp/small --tasks arc_easy mmlu_stem 'blimp_*' --data DIR
  moejax evaluate /tmp/small --tasks gsm8k_cot --few-shot 4 --gen-kwargs max_gen_toks=128 --log-samples"""


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.epilog = EVALUATE
  parser.add_argument("run", nargs="?", type=path, metavar="RUN", help="directory of a trained run")
  parser.add_argument(
    "--tasks", nargs="+", metavar="TASK",
    help="the suite core_en (14 benchmarks), or tasks, groups, tags and patterns of lm-evaluation-harness (see "
    "`lm-eval ls tasks`); required unless the run has evaluation.tasks, which is the default",
  )  # fmt: skip
  parser.add_argument("--limit", type=int, metavar="N", help="use the first N examples of each task (default: all)")
  parser.add_argument(
    "--data", type=path, metavar="DIR",
    help="read the data of the tasks from DIR/TASK/SPLIT.jsonl (default: from the Hugging Face Hub or its cache)",
  )  # fmt: skip
  parser.add_argument(
    "--few-shot", type=int, metavar="N",
    help="number of examples in each prompt (default: that of the suite or the task)",
  )  # fmt: skip
  parser.add_argument(
    "--include-path", type=path, metavar="DIR",
    help="folder with custom task YAML files; a file replaces the task of the harness with the same name",
  )  # fmt: skip
  parser.add_argument(
    "--gen-kwargs", metavar="KEY=VALUE,...",
    help="override generation options of the tasks: max_gen_toks, until, do_sample, temperature, top_k, top_p, min_p",
  )  # fmt: skip
  parser.add_argument(
    "--log-samples", action="store_true",
    help="write every example, with its prompts and the answers of the model, to RUN/evaluation/samples/TASK.jsonl",
  )  # fmt: skip
  add_sparse(parser)
  parser.add_argument(
    "--checkpoint", default="latest", metavar="WHICH",
    help="latest, best (the lowest held-out bits per byte of the evaluated steps) or a step (default: latest)",
  )  # fmt: skip


def run(known: argparse.Namespace, overrides: list[str]) -> int:
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
      sparse=known.sparse,
      checkpoint=known.checkpoint,
      experiment=experiment,
      progress=progress,
    )
  from moejax import describe

  if processes.is_first():
    output().print(describe.scores_page(evaluated.scores, evaluated.results), soft_wrap=True)
  return 0
