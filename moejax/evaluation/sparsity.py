"""What a model that was trained with all experts loses and gains with fewer of them: held-out loss, active parameters
and speed, mode by mode (DS-MoE, arXiv 2404.05567, sections 3.5 and 3.6).

B batch  T query position  D embed  L stacked layers
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config.experiment import Experiment
from moejax.config.sharding import check_dimensions
from moejax.data.corpus import Corpus
from moejax.data.pipeline import evaluation_batches, num_evaluation_batches
from moejax.errors import UserError
from moejax.inference.dropless import inference_model
from moejax.inference.generate import Generator
from moejax.inference.load import Loaded
from moejax.inference.sparse import THRESHOLD, Sparse
from moejax.models.abstract import AbstractModel, Parameters
from moejax.models.moe.router_counts import EXPERTS
from moejax.partitioning import to_devices
from moejax.progress import SILENT, Progress
from moejax.training.loss import Batch
from moejax.training.step import BATCH_TYPES

ALL = "all"
"""The mode that uses all experts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
  """How tokens per second are measured: the modes take turns, and each has the median of its turns."""

  batch_sizes: tuple[int, ...] = (1, 16)
  prompt_tokens: int = 128
  new_tokens: int = 128
  rounds: int = 5


def default_modes(num_experts: int) -> list[Sparse]:
  """Modes from many experts to few."""
  thresholds = [Sparse("threshold", factor * THRESHOLD) for factor in (0.5, 1.0, 1.5, 2.0)]
  counts = [Sparse("top_k", float(num_experts >> shift)) for shift in (1, 2, 3) if num_experts >> shift]
  return [*thresholds, *counts, Sparse("threshold_top_k", THRESHOLD)]


def measure_modes(
  loaded: Loaded,
  corpus: Corpus,
  modes: Sequence[Sparse],
  max_increase: float,
  speed: Speed | None,
  progress: Progress = SILENT,
) -> dict[str, Any]:
  """The content of sparsity.json: `modes`, of which the first uses all experts, and `chosen`, the name of the mode with
  the fewest active parameters whose perplexity is at most `max_increase` above that of all experts.

  A mode has `mode`, `perplexity`, `perplexity_increase`, `parameters_active`, `active_fraction`, `experts_per_token`
  of each sparse layer, and `tokens_per_s` by batch size if there is a `speed`.

  Raises:
    UserError: as `sparse_model`, a mode is named twice, or the mesh does not divide a batch size.
  """
  names = [ALL, *map(str, modes)]
  if len(set(names)) < len(names):
    raise UserError(f"modes {' '.join(names[1:])} name one twice; name each once")
  partitioner = loaded.model.partitioner
  config = dataclasses.replace(loaded.experiment.model, layers=loaded.model.config.layers)
  models = dict(zip(names, [inference_model(config, partitioner, mode) for mode in (None, *modes)], strict=True))
  for size in speed.batch_sizes if speed else ():
    check_dimensions("--batch-sizes", {"batch": size}, partitioner.rules, partitioner.shape)
  rows = []
  for name, model in models.items():
    progress.stage(f"score {name}")
    rows.append({"mode": name} | _scored(model, loaded.parameters, corpus, loaded.experiment))
  for row in rows:
    row["perplexity_increase"] = row["perplexity"] / rows[0]["perplexity"] - 1.0
  if speed is not None:
    for name, measured in _speeds(models, loaded, corpus, speed, progress).items():
      rows[names.index(name)]["tokens_per_s"] = measured
  within = [row for row in rows if row["perplexity_increase"] <= max_increase]
  chosen = min(within, key=lambda row: row["parameters_active"])
  return {"step": loaded.step, "max_increase": max_increase, "chosen": chosen["mode"], "modes": rows}


def _scored(model: AbstractModel, parameters: Parameters, corpus: Corpus, experiment: Experiment) -> dict[str, Any]:
  """Perplexity of the held-out text, and the experts that it took."""

  def score(parameters: Parameters, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    transformer = model.module(parameters)
    x_BTD, counts = transformer(batch["tokens"], batch["segments"], batch["positions"])
    loss_BT = transformer.score(x_BTD, batch["targets"]).loss_BT
    nats = jnp.sum(jnp.where(batch["weights"] > 0, loss_BT, 0.0))
    choices_L = jnp.sum(counts[EXPERTS]["choices"], axis=(1, 2, 3))
    return nats, choices_L, jnp.sum(counts[EXPERTS]["tokens"], axis=(1, 2))

  placement = model.partitioner
  scorer = jax.jit(
    score,
    in_shardings=(model.shardings, dict.fromkeys(BATCH_TYPES, placement.batch)),
    out_shardings=placement.replicated,
  )
  nats, targets, choices_L, tokens_L = 0.0, 0, np.zeros(()), np.zeros(())
  for batch in _batches(corpus, experiment):
    placed = to_devices({name: batch[name] for name in BATCH_TYPES}, placement.batch)
    of_batch, *counted = jax.device_get(scorer(parameters, placed))
    nats, targets = nats + float(of_batch), targets + int((batch["weights"] > 0).sum())
    choices_L, tokens_L = choices_L + np.float64(counted[0]), tokens_L + np.float64(counted[1])
  assert model.config.moe
  used_L = choices_L / tokens_L
  leaves = jax.tree_util.tree_leaves_with_path(model.parameters)
  total = sum(math.prod(leaf.shape) for _, leaf in leaves)
  of_experts = sum(math.prod(leaf.shape) for path, leaf in leaves if "experts" in [key.key for key in path])
  active = total - of_experts * (1.0 - float(np.mean(used_L)) / model.config.moe.num_experts)
  return {
    "perplexity": math.exp(nats / targets),
    "parameters_active": round(active),
    "active_fraction": active / total,
    "experts_per_token": used_L.tolist(),
  }


def _batches(corpus: Corpus, experiment: Experiment) -> Iterator[Any]:
  evaluation = experiment.evaluation
  arguments = (corpus.validation, experiment.data.sequence_length, evaluation.batch_size, evaluation.max_tokens)
  if not num_evaluation_batches(*arguments):
    raise UserError(f"the held-out text is shorter than data.sequence_length={experiment.data.sequence_length}")
  return evaluation_batches(*arguments)


def _speeds(
  models: dict[str, AbstractModel], loaded: Loaded, corpus: Corpus, speed: Speed, progress: Progress
) -> dict[str, dict[str, float]]:
  """New tokens per second, prefill included, of each mode by batch size."""
  length = loaded.experiment.data.sequence_length
  prompt_tokens = min(speed.prompt_tokens, length // 2)
  new_tokens = min(speed.new_tokens, length - prompt_tokens)
  tokens_BT = next(_batches(corpus, loaded.experiment))["tokens"]
  found: dict[str, dict[str, float]] = {name: {} for name in models}
  for size in speed.batch_sizes:
    prompts = [tokens_BT[i % len(tokens_BT), :prompt_tokens].tolist() for i in range(size)]
    generators = {name: Generator(model, size, corpus.tokenizer.vocab_size) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    progress.stage(f"generate with batch size {size}", total=speed.rounds + 1)
    for turn in range(speed.rounds + 1):
      for name, generator in generators.items():
        begin = time.perf_counter()
        list(generator.generate(loaded.parameters, prompts, [lambda ids: False] * size, new_tokens))
        if turn:  # the first compiles
          times[name].append(time.perf_counter() - begin)
      progress.advance(turn + 1)
    for name, measured in times.items():
      found[name][str(size)] = size * new_tokens / statistics.median(measured)
  return found
