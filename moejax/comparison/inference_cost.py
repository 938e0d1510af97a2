"""Inference cost of the members of pairs that have a DS-MoE: active parameters and generated tokens per second.

A DS-MoE is trained with all experts and used with few of them, so that its step time does not tell what inference
costs. Its cost is that of the sparsest mode whose perplexity is at most 3% above that of all experts.
"""

import dataclasses
import pathlib
from typing import Any

from moejax import processes
from moejax.comparison.claims import train_unclaimed
from moejax.comparison.record import INFERENCE, Comparison
from moejax.config.experiment import Experiment, Pair, Suite
from moejax.config.parameters import parameter_counts
from moejax.config.sharding import shards
from moejax.data.corpus import Corpus
from moejax.evaluation.decode_speed import Speed, decode_speeds
from moejax.evaluation.sparsity import ALL, Sweep, measure_modes
from moejax.files import read_json, write_json
from moejax.inference.dropless import inference_model
from moejax.inference.load import Loaded, load_run
from moejax.inference.sparse import parse_sparse
from moejax.progress import SILENT, Progress
from moejax.training.run_directory import read_experiment

FOLDER = "inference"
"""Folder of a comparison."""
MAX_INCREASE = 0.03
"""Accepted increase in perplexity, as a fraction."""
SPEED = Speed(rounds=3)


def measure_inference(suite: Suite, corpus: Corpus, directory: pathlib.Path, progress: Progress = SILENT) -> None:
  """Measures the trained members of each pair with a DS-MoE, unless another job has done so, and writes
  DIR/inference/DENSE/costs.json.

  Args:
    suite: the suite, all members of which are trained.
    corpus: the text of the comparison.
    directory: of the comparison.
    progress: receives progress reports.
  """
  pairs = {pair.dense.name: pair for pair in suite.pairs if any(map(_is_ds_moe, pair.candidates))}

  def measure(dense: str) -> None:
    costs = inference_costs(pairs[dense], directory / "runs", corpus, progress)
    processes.first(lambda: write_json(_path(directory, dense), costs))

  train_unclaimed(
    [*pairs], directory / FOLDER, lambda dense: _read(directory, dense) is not None, measure, progress.note
  )


def with_inference(comparison: Comparison, directory: pathlib.Path) -> Comparison:
  """Adds to each member its inference cost, if it has been measured."""
  costs: dict[str, Any] = {}
  for pair in comparison.pairs:
    costs |= _read(directory, pair.dense) or {}
  members = [
    dataclasses.replace(member, more={**member.more, INFERENCE: costs[member.name]}) if member.name in costs else member
    for member in comparison.members
  ]
  return dataclasses.replace(comparison, members=tuple(members))


def inference_costs(
  pair: Pair, runs: pathlib.Path, corpus: Corpus, progress: Progress = SILENT, speed: Speed = SPEED
) -> dict[str, dict[str, Any]]:
  """The inference cost of the trained members of a pair by name: `mode` (None except for a DS-MoE),
  `parameters_active`, `perplexity_increase` over all experts, and `tokens_per_s` by batch size, for which members take
  turns. Batch sizes are rounded up to what the mesh divides. Members whose router is not causal are left out, since
  they cannot generate text.
  """
  members, costs = {}, {}
  for experiment in (pair.dense, *pair.candidates):
    causal = experiment.model.moe is None or not experiment.model.moe.router.looks_ahead
    if not causal or not processes.first((runs / experiment.name / "summary.json").exists):
      continue
    progress.stage(f"read {experiment.name}")
    there = read_experiment(runs / experiment.name)
    placed = dataclasses.replace(there, mesh=experiment.mesh, rules=experiment.rules)
    loaded = load_run(runs / experiment.name, placed, decode=True)
    cost, model = _cost_as_trained(experiment), loaded.model
    if _is_ds_moe(experiment):
      cost = _sparsest(loaded, corpus, progress)
      config = dataclasses.replace(experiment.model, layers=model.config.layers)
      sparse = None if cost["mode"] == ALL else parse_sparse(cost["mode"])
      model = inference_model(config, model.partitioner, sparse)
    members[experiment.name], costs[experiment.name] = (model, loaded.parameters), cost
  unit = max(shards(model.partitioner.rules, model.partitioner.shape, "batch") for model, _ in members.values())
  sizes = dict.fromkeys(-(-size // unit) * unit for size in speed.batch_sizes)
  speed = dataclasses.replace(speed, batch_sizes=tuple(sizes))
  speeds = decode_speeds(members, corpus, pair.dense, speed, progress)
  return {name: cost | {"tokens_per_s": speeds[name]} for name, cost in costs.items()}


def _cost_as_trained(experiment: Experiment) -> dict[str, Any]:
  return {
    "mode": None,
    "parameters_active": parameter_counts(experiment.model).active,
    "perplexity_increase": 0.0,
  }


def _sparsest(loaded: Loaded, corpus: Corpus, progress: Progress) -> dict[str, Any]:
  """The cost of the sparsest mode within the limit."""
  found = measure_modes(loaded, corpus, Sweep.of(loaded.experiment.model, (), MAX_INCREASE), progress)
  (row,) = [row for row in found["modes"] if row["mode"] == found["chosen"]]
  return {key: row[key] for key in _cost_as_trained(loaded.experiment)}


def _is_ds_moe(experiment: Experiment) -> bool:
  """Whether it is trained with all experts, and can use fewer. With a mixture of depths, there are no sparser modes."""
  model = experiment.model
  return model.moe is not None and model.moe.router.kind == "dense" and not model.depths.is_routed


def _read(directory: pathlib.Path, dense: str) -> dict[str, Any] | None:
  """The costs of the members of a pair. None if they are missing or damaged, and so have to be measured."""
  try:
    costs = read_json(_path(directory, dense))
  except (OSError, ValueError):
    return None
  keys = {"mode", "parameters_active", "perplexity_increase", "tokens_per_s"}
  whole = isinstance(costs, dict) and all(isinstance(cost, dict) and cost.keys() == keys for cost in costs.values())
  return costs if whole else None


def _path(directory: pathlib.Path, dense: str) -> pathlib.Path:
  return directory / FOLDER / dense / "costs.json"
