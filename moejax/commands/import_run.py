"""`moejax import`: convert a model in Hugging Face format to a run."""

import argparse

from moejax.command_line import path
from moejax.display import Display
from moejax.overrides import override
from moejax.verb_arguments import helped, required

IMPORT = """\
HF_DIR contains config.json, *.safetensors and the tokenizer. `hf download MODEL` downloads a model and prints this
folder. The supported families are Llama, Mistral, Qwen, Mixtral, OLMoE, DeepSeekMoE, DeepSeek-V3, Gemma 3, gpt-oss and
Llama 4. If a field of config.json is not supported, an error names it. RUN is a run at step 0 for `moejax generate`,
`evaluate` and `train`. To train it further, set its data, training and optimizer when it is imported:

examples:
  moejax import Qwen3-0.6B /tmp/qwen
  moejax import Mixtral-8x7B /tmp/mixtral --load-balance 0.01 --mesh.expert 8 --model.compute-dtype bfloat16
  moejax import Llama-2-7b /tmp/llama --sequence-length 2048 --data.train books/*.txt --optimizer.learning-rate 1e-5
  moejax train /tmp/llama/experiment.json --workdir /tmp/llama"""


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.epilog = IMPORT
  parser.add_argument("folder", nargs="?", type=path, metavar="HF_DIR", help="folder of the model")
  parser.add_argument("run", nargs="?", type=path, metavar="RUN", help="directory of the new run")
  parser.add_argument(
    "--load-balance", type=float, metavar="X",
    help="training.losses.load_balance of a sparse model; the loss is 1 if experts are balanced, and experts_per_token "
    "times as large in transformers",
  )  # fmt: skip
  parser.add_argument(
    "--sequence-length", type=int, metavar="N",
    help="tokens per training sequence, as in data.sequence_length (default: max_position_embeddings of config.json)",
  )  # fmt: skip


def run(known: argparse.Namespace, overrides: list[str]) -> int:
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
