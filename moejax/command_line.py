"""Defines the commands, their options and their help."""

import argparse
import pathlib
from collections.abc import Callable, Mapping
from typing import NoReturn

import moejax
from moejax.errors import UserError

Verb = Callable[[argparse.Namespace, list[str]], int]
"""Runs a command, given its own options and the options that set fields. Returns the exit code."""

Add = Callable[[str, str], argparse.ArgumentParser]
"""Adds a command with this name and description. Returns its parser."""

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


WITHOUT_EXPERIMENT = ("list", "data", "tokenizer", "calibrate", "report")
"""Commands without an experiment."""

TRIES = 8
"""Default of --tries, the number of configurations that a search compiles."""


class _Parser(argparse.ArgumentParser):
  """A parser that raises UserError with a message of one line."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message}; see `{self.prog} --help`")


def _path(text: str) -> pathlib.Path:
  """Parses a non-empty path. An empty path, as from an unset shell variable, would mean the current directory."""
  if not text.strip():
    raise argparse.ArgumentTypeError("the path is empty")
  return pathlib.Path(text)


def make_parser(verbs: Mapping[str, Verb]) -> argparse.ArgumentParser:
  """The parser of all commands. `verbs` has the function of each command."""
  formatter = argparse.RawDescriptionHelpFormatter
  parser = _Parser("moejax", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=formatter)
  parser.add_argument("--version", action="version", version=f"moejax {moejax.__version__}")
  commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

  def verb(name: str, summary: str) -> argparse.ArgumentParser:
    of_verb = commands.add_parser(
      name, help=summary, description=summary, formatter_class=formatter, add_help=False, allow_abbrev=False
    )
    of_verb.set_defaults(verb=verbs[name], parser=of_verb, imports=[])
    of_verb.add_argument(
      "-h", "--help", action="store_true", help="show this help and, if NAME is given, all its fields"
    )
    if name not in WITHOUT_EXPERIMENT:
      of_verb.add_argument(
        "--import",
        type=_path,
        action="append",
        metavar="FILE.py",
        dest="imports",
        help="Python file to import first, with custom routers, optimizers or other kinds that the experiment uses",
      )
    return of_verb

  verb("list", "List all experiments and suites.")
  _add_show(verb)
  _add_train(verb)
  _add_compare(verb)
  _add_evaluate(verb)
  _add_generate(verb)
  _add_import(verb)
  _add_export(verb)
  _add_upcycle(verb)
  _add_data(verb)
  _add_tokenizer(verb)
  _add_plan(verb)
  _add_match(verb)
  _add_calibrate(verb)
  _add_report(verb)
  return parser


def _add_show(verb: Add) -> None:
  show = verb("show", "Show an experiment or a suite: parameters, FLOPs, budget and all fields.")
  show.add_argument("name", nargs="?", metavar="NAME", help=NAME)
  show.add_argument("--json", action="store_true", help="print JSON")


def _add_train(verb: Add) -> None:
  train = verb("train", "Train an experiment and evaluate it on held-out text. Resumes from the latest checkpoint.")
  train.add_argument("name", nargs="?", metavar="NAME", help=NAME)
  train.add_argument("--workdir", type=_path, metavar="DIR", help="directory for checkpoints, metrics and results")


def _add_compare(verb: Add) -> None:
  compare = verb(
    "compare",
    "Compare dense and MoE models at equal step time: measure, match, train, evaluate, report. Resumable.",
  )
  compare.add_argument(
    "name", nargs="?", metavar="SUITE",
    help="a listed suite, FILE.py:FUNCTION, or DIR/suite.json of an existing comparison",
  )  # fmt: skip
  compare.add_argument("--workdir", type=_path, metavar="DIR", help="directory for runs, results and the report")


EVALUATE = """\
RUN is the --workdir of `moejax train`, or a directory in runs/ of a comparison. The latest checkpoint is evaluated, and
scores are written to RUN/results.json. Fields that do not affect the trained model can be set, as in --mesh.data 4 and
--evaluation.batch-size 32.

examples:
  moejax evaluate /tmp/small --tasks core_en --limit 100
  moejax evaluate /tmp/small --tasks arc_easy mmlu_stem 'blimp_*' --data DIR
  moejax evaluate /tmp/small --tasks gsm8k_cot --few-shot 4 --gen-kwargs max_gen_toks=128 --log-samples"""


def _add_evaluate(verb: Add) -> None:
  evaluate = verb("evaluate", "Run lm-evaluation-harness benchmarks on a trained model. Resumable.")
  evaluate.epilog = EVALUATE
  evaluate.add_argument("run", nargs="?", type=_path, metavar="RUN", help="directory of a trained run")
  evaluate.add_argument(
    "--tasks", nargs="+", metavar="TASK",
    help="the suite core_en (14 benchmarks), or tasks, groups, tags and patterns of lm-evaluation-harness (see "
    "`lm-eval ls tasks`); required unless the run has evaluation.tasks, which is the default",
  )  # fmt: skip
  evaluate.add_argument("--limit", type=int, metavar="N", help="use the first N examples of each task (default: all)")
  evaluate.add_argument(
    "--data", type=_path, metavar="DIR",
    help="read the data of the tasks from DIR/TASK/SPLIT.jsonl (default: from the Hugging Face Hub or its cache)",
  )  # fmt: skip
  evaluate.add_argument(
    "--few-shot", type=int, metavar="N",
    help="number of examples in each prompt (default: that of the suite or the task)",
  )  # fmt: skip
  evaluate.add_argument(
    "--include-path", type=_path, metavar="DIR",
    help="folder with custom task YAML files; a file replaces the task of the harness with the same name",
  )  # fmt: skip
  evaluate.add_argument(
    "--gen-kwargs", metavar="KEY=VALUE,...",
    help="override generation options of the tasks: max_gen_toks, until, do_sample, temperature, top_k, top_p, min_p",
  )  # fmt: skip
  evaluate.add_argument(
    "--log-samples", action="store_true",
    help="write every example, with its prompts and the answers of the model, to RUN/evaluation/samples/TASK.jsonl",
  )  # fmt: skip


GENERATE = """\
RUN is the --workdir of `moejax train`, or a member in runs/ of a comparison. Its latest checkpoint continues the text,
greedily unless --temperature is above 0, to the end of the document, a stop string, or --max-tokens. Options such as
--mesh.model 4 may follow.

Each line of a batch file is an object such as {"prompt": "...", "max_tokens": 64, "stop": ["\\n"]}. The output has the
same lines in the same order, with the fields text, tokens, finish_reason (stop or length) and prompt_cut added.

examples:
  moejax generate /tmp/small --prompt 'def main(' --max-tokens 100
  moejax generate /tmp/small --prompt 'import ' --temperature 0.8 --min-p 0.05 --stop $'\\n\\n' --seed 1
  moejax generate /tmp/small --batch-file prompts.jsonl --out answers.jsonl"""


def _add_generate(verb: Add) -> None:
  generate = verb("generate", "Continue text with a trained model.")
  generate.epilog = GENERATE
  generate.add_argument("run", nargs="?", type=_path, metavar="RUN", help="directory of a trained run")
  generate.add_argument(
    "--prompt", nargs="+", metavar="TEXT",
    help="text to continue; the continuation of a single prompt is printed as it is generated",
  )  # fmt: skip
  generate.add_argument("--batch-file", type=_path, metavar="FILE", help="JSONL file with the prompts")
  generate.add_argument(
    "--out", type=_path, metavar="FILE", help="JSONL file for the answers to --batch-file (default: standard output)"
  )
  generate.add_argument(
    "--max-tokens", type=int, default=64, metavar="N", help="maximum number of tokens to generate (default: 64)"
  )
  generate.add_argument(
    "--stop", nargs="+", default=(), metavar="TEXT", help="strings that end a continuation, which does not include them"
  )
  generate.add_argument(
    "--temperature", type=float, default=0.0, metavar="X",
    help="sampling temperature; 0 is greedy (default: 0)",
  )  # fmt: skip
  generate.add_argument("--top-k", type=int, metavar="N", help="sample from the N most probable tokens")
  generate.add_argument(
    "--top-p", type=float, metavar="P", help="sample from the most probable tokens with a total probability of P"
  )
  generate.add_argument(
    "--min-p", type=float, metavar="P", help="sample from tokens with at least P times the probability of the best one"
  )
  generate.add_argument("--seed", type=int, default=0, metavar="N", help="seed for sampling (default: 0)")


IMPORT = """\
HF_DIR holds config.json, *.safetensors and the tokenizer, as `hf download MODEL` prints its path. The families are
Llama, Mistral, Qwen, Mixtral, OLMoE and DeepSeekMoE; a configuration that moejax cannot express is refused with its
field. RUN becomes a run at step 0, which `moejax generate`, `evaluate` and `train` read. To train it further, give its
data, training and optimizer here:

examples:
  moejax import Qwen3-0.6B /tmp/qwen
  moejax import Mixtral-8x7B /tmp/mixtral --load-balance 0.01 --mesh.expert 8 --model.compute-dtype bfloat16
  moejax import Llama-2-7b /tmp/llama --sequence-length 2048 --data.train books/*.txt --optimizer.learning-rate 1e-5
  moejax train /tmp/llama/experiment.json --workdir /tmp/llama"""


def _add_import(verb: Add) -> None:
  parser = verb("import", "Make a run of a model in the format of Hugging Face.")
  parser.epilog = IMPORT
  parser.add_argument("folder", nargs="?", type=_path, metavar="HF_DIR", help="folder of the model")
  parser.add_argument("run", nargs="?", type=_path, metavar="RUN", help="directory of the new run")
  parser.add_argument(
    "--load-balance", type=float, metavar="X",
    help="training.losses.load_balance of a sparse model, 1 if experts are balanced; transformers' own coefficient "
    "multiplies experts_per_token times as much",
  )  # fmt: skip
  parser.add_argument(
    "--sequence-length", type=int, metavar="N",
    help="tokens of a training sequence, as data.sequence_length (default: max_position_embeddings of config.json)",
  )  # fmt: skip


def _add_export(verb: Add) -> None:
  export = verb("export", "Write a trained model in the format of Hugging Face.")
  export.epilog = """\
HF_DIR gets config.json, safetensors and the tokenizer, which transformers, vLLM and SGLang read. A model that no family
of Hugging Face expresses is refused with its field.

example:
  moejax export /tmp/small /tmp/small-hf --dtype bfloat16"""
  export.add_argument("run", nargs="?", type=_path, metavar="RUN", help="directory of a trained run")
  export.add_argument("folder", nargs="?", type=_path, metavar="HF_DIR", help="new folder for the model")
  export.add_argument(
    "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
    help="type of the weights (default: float32)",
  )  # fmt: skip


UPCYCLE = """\
RUN is a dense run. NEW becomes a run at step 0 whose sparse layers compute what the dense layers of RUN do: each expert
is a copy of a dense layer or, with --granularity G, one of G slices of a copy. Its data, training and optimizer are
those of RUN; options such as --training.steps 2000 and --mesh.expert 8 change them.

example:
  moejax upcycle /tmp/small /tmp/sparse --experts 8 --load-balance 0.01 --training.steps 500
  moejax train /tmp/sparse/experiment.json --workdir /tmp/sparse"""


def _add_upcycle(verb: Add) -> None:
  parser = verb("upcycle", "Make a sparse run of a dense one, which computes the same at the start.")
  parser.epilog = UPCYCLE
  parser.add_argument("run", nargs="?", type=_path, metavar="RUN", help="directory of a dense run")
  parser.add_argument("new", nargs="?", type=_path, metavar="NEW", help="directory of the new run")
  parser.add_argument("--experts", type=int, metavar="N", help="copies of each dense feed-forward layer")
  parser.add_argument("--active", type=int, default=2, metavar="N", help="copies per token (default: 2)")
  parser.add_argument(
    "--granularity", type=int, default=1, metavar="G", help="experts that a copy is divided into (default: 1)"
  )
  parser.add_argument("--every", type=int, default=1, metavar="N", help="make every n-th layer sparse (default: 1)")
  parser.add_argument(
    "--noise", type=float, default=0.0, metavar="X",
    help="add noise to the experts, with X times the standard deviation of a matrix (default: 0, none)",
  )  # fmt: skip
  parser.add_argument("--load-balance", type=float, metavar="X", help="training.losses.load_balance of the new run")
  parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the router and the noise (default: 0)")


def _add_data(verb: Add) -> None:
  data = verb("data", "Tokenize text once into shards that any number of runs and hosts can read. Resumable.")
  data.add_argument("action", nargs="?", choices=("pack",), help="pack: write a folder of shards for data.train")
  _add_text(data)
  data.add_argument(
    "--tokenizer", default="bytes", metavar="NAME", help="tokenizer, as in data.tokenizer (default: bytes)"
  )
  data.add_argument("--out", type=_path, metavar="DIR", help="output folder")
  data.add_argument(
    "--keep", choices=("all", "train", "validation"), default="all",
    help="which part of the train/validation split to pack (default: all)",
  )  # fmt: skip
  data.add_argument(
    "--validation-fraction", type=float, metavar="F",
    help="fraction of the documents in the validation part, as in data.validation_fraction (default: 0.05)",
  )  # fmt: skip
  data.add_argument(
    "--deduplicate", action="store_true", help="pack only the first of several documents with the same text"
  )
  data.add_argument(
    "--document-length", type=int, metavar="N",
    help="maximum length of a document in characters, as in data.document_length",
  )  # fmt: skip
  data.add_argument(
    "--processes", type=int, metavar="N", help="number of tokenizer processes (default: one per CPU core)"
  )
  data.add_argument(
    "--shard-tokens", type=int, default=2**25, metavar="N", help="number of tokens per shard (default: 2**25)"
  )


def _add_tokenizer(verb: Add) -> None:
  tokenizer = verb("tokenizer", "Train a byte-level BPE tokenizer on text.")
  tokenizer.add_argument("action", nargs="?", choices=("train",), help="train: write a tokenizer.json")
  _add_text(tokenizer)
  tokenizer.add_argument(
    "--vocab-size", type=int, default=32_768, metavar="N",
    help="vocabulary size, including special tokens (default: 32768)",
  )  # fmt: skip
  tokenizer.add_argument("--out", type=_path, metavar="FILE", help="output .json file")


def _add_plan(verb: Add) -> None:
  plan = verb("plan", "Predict step time and memory on a TPU or GPU topology. No accelerator is needed.")
  plan.add_argument(
    "name", nargs="?", metavar="NAME",
    help=f"{NAME}; or another project's model: hf:PATH to a Hugging Face config.json, maxtext:PATH.yml,NAME=VALUE,...",
  )  # fmt: skip
  plan.add_argument(
    "other", nargs="?", metavar="OTHER",
    help="a second experiment, to compare the two step times by operation; options set the fields of OTHER, and "
    "--dense.PATH sets a field of NAME",
  )  # fmt: skip
  _add_topology(plan)
  plan.add_argument(
    "--price-per-chip-hour", type=float, metavar="X",
    help="price in any currency, to estimate the cost of the whole run",
  )  # fmt: skip
  plan.add_argument(
    "--load", nargs="+", default=[], metavar="LOAD",
    help="also plan these unbalanced router loads: numbers (load of the busiest device or expert divided by the mean) "
    "or worst",
  )  # fmt: skip
  plan.add_argument(
    "--precision", nargs="+", default=[], metavar="TYPE",
    help="also plan the products of projections and dense feed-forward layers in these types: bfloat16, fp8, int8",
  )  # fmt: skip
  plan.add_argument(
    "--offload", nargs="+", default=[], metavar="GROUP",
    help="also estimate what moving activations or moments (or both) to the memory of the host frees and costs",
  )  # fmt: skip
  plan.add_argument(
    "--without", nargs="+", default=[], metavar="FEATURE",
    help="plan an hf: or maxtext: model without these features, which moejax does not support; the error message for "
    "such a model lists them",
  )  # fmt: skip
  plan.add_argument(
    "--against", metavar="MEASURED",
    help="a measured step time, in seconds or as the directory of a run, to show beside the prediction; with "
    "--calibration, the file records both and calibrates later plans",
  )  # fmt: skip
  plan.add_argument(
    "--search", action="store_true", help="search over meshes, remat, gradient accumulation and dispatch. Resumable."
  )
  plan.add_argument(
    "--tries", type=int, metavar="N", help=f"number of configurations that --search compiles (default: {TRIES})"
  )
  plan.add_argument("--json", type=_path, metavar="FILE", help="also write all numbers to FILE")
  plan.add_argument("--html", type=_path, metavar="FILE", help="also write the plan as an HTML page to FILE")


def _add_match(verb: Add) -> None:
  match = verb(
    "match",
    "Find the MoE model with the step time of a dense model on a TPU or GPU topology. No accelerator is needed.",
  )
  match.add_argument("dense", nargs="?", metavar="DENSE", help=f"the dense experiment: {NAME}")
  match.add_argument(
    "name", nargs="?", metavar="MOE",
    help="the MoE experiment, whose `matchable` fields are varied; options set its fields, and --dense.PATH sets a "
    "field of DENSE",
  )  # fmt: skip
  _add_topology(match)
  match.add_argument(
    "--tolerance", type=float, default=0.05, metavar="X",
    help="maximum relative difference of step times that are considered equal (default: 0.05)",
  )  # fmt: skip
  match.add_argument(
    "--out", type=_path, metavar="FILE", help="output file with the matched experiment (default: MOE_matched.py)"
  )


CALIBRATE = """\
Measures the speed of one accelerator of this machine: matrix products, copies, attention, grouped products, and the
overhead of a step. Takes a few minutes. Plans for such chips use the result, and measured steps make it more accurate:

  moejax calibrate --out mine.json
  moejax plan NAME --topology gpu:h100:8 --calibration mine.json
  moejax plan NAME --topology gpu:h100:8 --calibration mine.json --against 1.84"""


def _add_calibrate(verb: Add) -> None:
  calibrate = verb("calibrate", "Measure the speed of an accelerator of this machine, for plans.")
  calibrate.epilog = CALIBRATE
  calibrate.add_argument(
    "--out", type=_path, metavar="FILE", help="output file; it keeps what it has of other chips, and measured steps"
  )


def _add_report(verb: Add) -> None:
  report = verb("report", "Regenerate the report of a comparison.")
  report.add_argument("workdir", nargs="?", type=_path, metavar="DIR", help="the --workdir of a comparison")


def _add_text(verb: argparse.ArgumentParser) -> None:
  verb.add_argument("--source", nargs="+", action="extend", metavar="SOURCE", help="text sources, as in data.train")
  verb.add_argument(
    "--text-field", default="text", metavar="NAME",
    help="field or column that holds the text, as in data.text_field (default: text)",
  )  # fmt: skip
  verb.add_argument(
    "--on-error", choices=("stop", "skip"), default="stop",
    help="what to do with records and files that cannot be read, as in data.on_error (default: stop)",
  )  # fmt: skip


def _add_topology(parser: argparse.ArgumentParser) -> None:
  known = "v4:8x8x8, v5e:16x16, v5p:4x8x8, v6e:16x16, tpu7x:4x4x8, gpu:h100:8, cpu:8"
  parser.add_argument("--topology", metavar="NAME", help=f"topology, such as {known}")
  parser.add_argument(
    "--slices", type=int, default=1, metavar="N",
    help="number of slices, connected by the data-center network (default: 1)",
  )  # fmt: skip
  parser.add_argument(
    "--calibration", type=_path, metavar="FILE",
    help="measurements of the chip by `moejax calibrate` and --against (default: from published runs)",
  )  # fmt: skip
