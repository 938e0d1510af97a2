"""Drops experts of a run, and compares perplexity, memory and speed of both runs.

B batch  T query position  D embed
"""

import dataclasses
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config.experiment import Experiment
from moejax.config.fields import with_fields
from moejax.data.corpus import Corpus, build_corpus
from moejax.data.pipeline import evaluation_batches
from moejax.data.text import open_text
from moejax.errors import UserError
from moejax.files import write_json
from moejax.inference.generate import Generator
from moejax.inference.load import Loaded, load_run
from moejax.interop.first_checkpoint import check_new_run, spec_of_new_run
from moejax.interop.layer_inputs import calibration_batches
from moejax.interop.prune import prune, pruned_experiment, pruned_model
from moejax.models.abstract import Parameters
from moejax.partitioning import to_devices
from moejax.progress import SILENT, Progress
from moejax.training.loss import Batch
from moejax.training.memory import argument_bytes
from moejax.training.prepare import on_devices, open_workspace
from moejax.training.run_directory import read_experiment
from moejax.training.step import BATCH_TYPES

NEW_TOKENS = 64
"""Number of tokens that a round of the speed measurement generates for each prompt."""


def prune_run(
  directory: pathlib.Path,
  new: pathlib.Path,
  keep: int,
  data: tuple[str, ...],
  calibration_tokens: int,
  batch_size: int,
  rounds: int,
  experiment: Experiment | None,
  progress: Progress,
) -> dict[str, Any]:
  """Implements `moejax.api.prune`."""
  for name, value in (("batch-size", batch_size), ("rounds", rounds), ("calibration-tokens", calibration_tokens)):
    if value < 1:
      raise UserError(f"--{name} {value} must be above 0")
  there = read_experiment(directory)
  experiment = experiment or pruned_experiment(there, new, keep)
  if experiment.model != pruned_model(there.model, keep):
    raise UserError(
      f"the model of the new run must be that of {directory} with {keep} experts; do not change its model"
    )
  check_new_run(new)
  text = open_text(there.data, directory)
  (placed,) = on_devices([experiment], text.tokenizer)
  here = with_fields(there, {"mesh": placed.experiment.mesh, "rules": placed.experiment.rules})
  with open_workspace([here], text, directory, f"prune {directory}", progress) as workspace:
    corpus = workspace.corpus
  with tempfile.TemporaryDirectory() as folder:
    calibration = corpus
    if data:
      of_calibration = dataclasses.replace(there.data, train=data, weights=(), validation=())
      calibration = build_corpus(open_text(of_calibration), pathlib.Path(folder))
    batches = calibration_batches(calibration, there, calibration_tokens)
  spec = spec_of_new_run(placed, new)
  trained = load_run(directory, here, progress.note)
  layers = prune(trained.model, trained.parameters, spec, new, batches, progress)
  of_run = {directory: here, new: placed.experiment}
  runs = {str(path): load_run(path, of_run[path], progress.note, decode=True) for path in of_run}
  found = {
    "keep": keep,
    "calibration_tokens": sum(int((batch["segments"] > 0).sum()) for batch in batches),
    "layers": [dataclasses.asdict(layer) for layer in layers],
    "models": compare_runs(runs, corpus, batch_size, rounds, progress),
  }
  write_json(new / "pruning.json", found)
  return found


def compare_runs(
  runs: Mapping[str, Loaded], corpus: Corpus, batch_size: int, rounds: int, progress: Progress = SILENT
) -> list[dict[str, Any]]:
  """For each run its `model`, `perplexity` on the held-out text, `parameters_total`, `parameters_bytes_per_device`, and
  `tokens_per_s`: the median of `rounds` rounds of generation, in which the runs take turns.

  Raises:
    UserError: If there is no held-out text.
  """
  rows: list[dict[str, Any]] = []
  prompts: list[list[int]] = []
  for name, run in runs.items():
    progress.stage(f"score {name}")
    perplexity, prompts = _perplexity(run, corpus)
    rows.append(
      {
        "model": name,
        "perplexity": perplexity,
        "parameters_total": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.model.parameters)),
        "parameters_bytes_per_device": argument_bytes(run.model.parameters),
      }
    )
  prompts = [prompts[i % len(prompts)] for i in range(batch_size)]
  length = min(run.experiment.data.sequence_length for run in runs.values())
  new_tokens = max(1, min(NEW_TOKENS, length - len(prompts[0])))
  shards = max(run.model.partitioner.shards("batch") for run in runs.values())
  rows_of_batch = shards * math.ceil(batch_size / shards)
  generators = {name: Generator(run.model, rows_of_batch, corpus.tokenizer.vocab_size) for name, run in runs.items()}
  times: dict[str, list[float]] = {name: [] for name in runs}
  progress.stage("generate", total=rounds + 1)
  for turn in range(rounds + 1):
    for name, generator in generators.items():
      begin = time.perf_counter()
      list(generator.generate(runs[name].parameters, prompts, [lambda ids: False] * batch_size, new_tokens))
      if turn:  # the first compiles
        times[name].append(time.perf_counter() - begin)
    progress.advance(turn + 1)
  for row in rows:
    row["tokens_per_s"] = batch_size * new_tokens / statistics.median(times[row["model"]])
  return rows


def _perplexity(run: Loaded, corpus: Corpus) -> tuple[float, list[list[int]]]:
  """Perplexity on the held-out text, and prompts from it of half the sequence length."""
  model, experiment, placement = run.model, run.experiment, run.model.partitioner

  def score(parameters: Parameters, batch: Batch) -> jax.Array:
    transformer = model.module(parameters)
    x_BTD, _ = transformer(batch["tokens"], batch["segments"], batch["positions"])
    loss_BT = transformer.score(x_BTD, batch["targets"]).loss_BT
    return jnp.sum(jnp.where(batch["weights"] > 0, loss_BT, 0.0))

  scorer = jax.jit(
    score,
    in_shardings=(model.shardings, dict.fromkeys(BATCH_TYPES, placement.batch)),
    out_shardings=placement.replicated,
  )
  length, evaluation = experiment.data.sequence_length, experiment.evaluation
  nats, targets = 0.0, 0
  prompts: list[list[int]] = []
  for batch in evaluation_batches(corpus.validation, length, evaluation.batch_size, evaluation.max_tokens):
    placed = to_devices({name: batch[name] for name in BATCH_TYPES}, placement.batch)
    nats, targets = nats + float(scorer(run.parameters, placed)), targets + int((batch["weights"] > 0).sum())
    prompts = prompts or batch["tokens"][:, : max(1, length // 2)].tolist()
  if not targets:
    raise UserError(f"the held-out text is shorter than data.sequence_length={length}")
  return math.exp(nats / targets), prompts
