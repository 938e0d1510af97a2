"""New tokens per second of moejax and of Hugging Face transformers: same weights, same CPU, float32, greedy, batch 1.

A random model is made by transformers and read by moejax as `moejax import` does. The two take turns, and both must
generate the same tokens. For the MoE, transformers runs each of its implementations of experts. Needs torch and
transformers.

    python tests/benchmarks/hf_decode.py [--kinds dense moe] [--layers 4] [--d-model 256] [--d-ff 512] [--rounds 7]
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # threads of torch that wait would take the cores of JAX
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import torch
import transformers

from moejax.config import DATA_EXPERT_MODEL, Mesh
from moejax.inference.dropless import inference_model
from moejax.inference.generate import Generator
from moejax.inference.unrolled import unroll
from moejax.interop.configs import family_of, model_of, read_config
from moejax.interop.safetensors import open_folder
from moejax.interop.weights import read_parameters
from moejax.partitioning import make_partitioner

EXPERTS = ("eager", "grouped_mm", "batched_mm")
"""Implementations of experts in transformers."""

Generate = Callable[[list[int], int], list[int]]
"""Maps a prompt and a number of tokens to a continuation."""


def theirs(model: Any) -> Generate:
  def generate(prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
      out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
      )
    return out[0, len(prompt) :].tolist()

  return generate


def ours(folder: pathlib.Path) -> Generate:
  config = read_config(folder)
  partitioner = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
  model = inference_model(model_of(config), partitioner)
  model, parameters = unroll(model, read_parameters(open_folder(folder), model, family_of(config)))
  generator = Generator(model, 1, model.config.vocab_size)

  def generate(prompt: list[int], new: int) -> list[int]:
    return dict(generator.generate(parameters, [prompt], [lambda ids: False], new))[0]

  return generate


def make_theirs(kind: str, known: argparse.Namespace) -> Any:
  shape = {
    "vocab_size": known.vocab, "hidden_size": known.d_model, "num_hidden_layers": known.layers,
    "num_attention_heads": known.heads, "num_key_value_heads": known.heads, "tie_word_embeddings": False,
    "max_position_embeddings": 2 * (known.prompt + known.new),
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
  }  # fmt: skip
  torch.manual_seed(0)
  if kind == "dense":
    config = transformers.LlamaConfig(**shape, intermediate_size=2 * known.d_ff)
    return transformers.LlamaForCausalLM(config).float().eval()
  experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
  config = transformers.MixtralConfig(**shape, **experts, intermediate_size=known.d_ff)
  return transformers.MixtralForCausalLM(config).float().eval()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  sizes = {
    "layers": 4, "d-model": 256, "heads": 4, "d-ff": 512, "vocab": 8192, "prompt": 16, "new": 64, "rounds": 7,
    "threads": os.cpu_count(),
  }  # fmt: skip
  for name, default in sizes.items():
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--kinds", nargs="+", choices=("dense", "moe"), default=["dense", "moe"])
  known = parser.parse_args()
  torch.set_num_threads(known.threads)
  prompt = torch.randint(2, known.vocab, (known.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
  print("model  parameters  program                  new tokens/s  moejax relative to it")
  for kind in known.kinds:
    model = make_theirs(kind, known)
    count = sum(parameter.numel() for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
      model.save_pretrained(folder)
      programs = {"moejax": ours(pathlib.Path(folder))}

    def of_implementation(name: str | None, model: Any = model) -> Generate:
      run = theirs(model)

      def generate(prompt: list[int], new: int) -> list[int]:
        if name is not None:
          model.set_experts_implementation(name)
        return run(prompt, new)

      return generate

    for name in EXPERTS if kind == "moe" else (None,):
      programs[f"transformers {name or ''}"] = of_implementation(name)
    expected = {name: program(prompt, known.new) for name, program in programs.items()}
    assert all(tokens == expected["moejax"] for tokens in expected.values()), expected
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(known.rounds):
      for name, program in programs.items():
        begin = time.perf_counter()
        program(prompt, known.new)
        times[name].append(time.perf_counter() - begin)
    for name, measured in times.items():
      ratio = statistics.median(there / here for there, here in zip(measured, times["moejax"], strict=True))
      speed = known.new / statistics.median(measured)
      print(f"{kind:5}  {count / 1e6:9.1f}M  {name:23}  {speed:12.1f}  {ratio:8.2f}", flush=True)


if __name__ == "__main__":
  main()
