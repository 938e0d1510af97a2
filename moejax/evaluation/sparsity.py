"""What a model that was trained with all experts loses and gains with fewer of them: held-out loss, active parameters
and speed, mode by mode (DS-MoE, arXiv 2404.05567, sections 3.5 and 3.6).

B batch  T query position  D embed  L stacked layers  E experts  O outer batch  M tokens
"""

import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config.experiment import Experiment
from moejax.config.fields import with_fields
from moejax.config.model import Model
from moejax.data.corpus import Corpus
from moejax.data.text import open_text
from moejax.errors import UserError
from moejax.evaluation.decode_speed import Speed, decode_speeds, held_out_batches
from moejax.inference.dropless import inference_model
from moejax.inference.load import Loaded, load_run
from moejax.inference.sparse import THRESHOLD, Sparse, check_trained_densely, parse_sparse, sparse_model
from moejax.models.abstract import AbstractModel, Parameters
from moejax.models.moe.router_counts import EXPERTS, HEADS, RouterCounts
from moejax.partitioning import to_devices
from moejax.progress import SILENT, Progress
from moejax.training.loss import Batch
from moejax.training.prepare import open_workspace
from moejax.training.step import BATCH_TYPES

ALL = "all"
"""The mode that uses all experts."""


def default_modes(num_experts: int) -> list[Sparse]:
  """Modes from many experts to few."""
  thresholds = [Sparse("threshold", factor * THRESHOLD) for factor in (0.5, 1.0, 1.5, 2.0)]
  counts = [Sparse("top_k", float(num_experts >> shift)) for shift in (1, 2, 3) if num_experts >> shift]
  return [*thresholds, *counts, Sparse("threshold_top_k", THRESHOLD)]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The modes to measure, and how."""

  modes: tuple[Sparse, ...]
  """Besides that of all experts."""
  max_increase: float
  """The mode that is chosen has the fewest active parameters of those whose perplexity is at most this fraction above
  that of all experts."""
  speed: Speed | None = None
  """How tokens per second are measured. None does not measure them."""

  def __post_init__(self) -> None:
    names = list(map(str, self.modes))
    if len(set(names)) < len(names):
      raise UserError(f"modes {' '.join(names)} name one twice; name each once")
    if not self.max_increase >= 0:
      raise UserError(f"--max-increase {self.max_increase} must be 0 or above, as in 0.03 for 3%")

  @property
  def names(self) -> tuple[str | None, ...]:
    """The names of all modes. That of all experts is None."""
    return None, *map(str, self.modes)

  @staticmethod
  def of(
    model: Model, modes: Sequence[str], max_increase: float, batch_sizes: Sequence[int] = (), rounds: int = 5
  ) -> "Sweep":
    """Makes a sweep of modes by their names (see `parse_sparse`) or, if there are none, of many experts to few.

    Raises:
      UserError: If the model was not trained with all experts, has a mixture of depths, or an argument is not valid.
    """
    num_experts = check_trained_densely(model, "moejax sparsity").num_experts
    if model.depths.is_routed:
      raise UserError(f"moejax sparsity does not support model.depths.kind={model.depths.kind}; use a run with all")
    parsed = [parse_sparse(mode) for mode in modes] or default_modes(num_experts)
    for mode in parsed:
      sparse_model(model, mode)  # raises for more experts than there are
    speed = Speed(batch_sizes=tuple(batch_sizes), rounds=rounds) if batch_sizes else None
    return Sweep(tuple(parsed), max_increase, speed)


def measure_run(
  directory: pathlib.Path,
  experiment: Experiment,
  data: Sequence[str],
  sweep: Sweep,
  scores: Mapping[str | None, Mapping[str, float]],
  progress: Progress = SILENT,
) -> dict[str, Any]:
  """The content of sparsity.json (see `measure_modes`) for the latest checkpoint of a run.

  Args:
    directory: directory of the run.
    experiment: the experiment of the run, possibly with another mesh, rules or evaluation.
    data: text to score. If empty, the held-out text of the run.
    sweep: the modes.
    scores: benchmark scores by mode, as in `Sweep.names`, which become `tasks` of the modes. May be empty.
    progress: receives progress reports.

  Raises:
    UserError: as `measure_modes`, or the run or the text cannot be read.
  """
  run = with_fields(experiment, {"data.validation": tuple(data)}) if data else experiment
  with tempfile.TemporaryDirectory() as elsewhere:
    folder = pathlib.Path(elsewhere) if data else directory
    text = open_text(run.data, folder)
    with open_workspace([run], text, folder, f"sparsity {directory}", progress) as workspace:
      placed = workspace.placed[run.name].experiment
      progress.stage(f"read {directory}")
      loaded = load_run(directory, dataclasses.replace(placed, data=experiment.data), decode=True)
      found = measure_modes(loaded, workspace.corpus, sweep, progress)
  for name, row in zip(sweep.names, found["modes"], strict=True):
    row |= {"tasks": scores[name]} if name in scores else {}
  return found


def measure_modes(loaded: Loaded, corpus: Corpus, sweep: Sweep, progress: Progress = SILENT) -> dict[str, Any]:
  """The content of sparsity.json: `step` of the checkpoint, `num_experts` and `attention_experts` of the model (None
  without attention experts), `modes`, of which the first uses all experts, and `chosen`, the name of the mode with the
  fewest active parameters within the limit of the sweep.

  A mode has `mode`, `perplexity`, `perplexity_increase`, `parameters_active`, `active_fraction`, and `tokens_per_s` by
  batch size if there is a `speed`. Each of these is a list over layers: `experts_per_token`, its standard deviation
  over tokens `experts_per_token_stdev` and, in a mode with a threshold and with attention experts, the number of
  attention experts whose probability is above it, `attention_experts_above_threshold`, and `..._stdev`. Attention uses
  all its experts in every mode.

  Raises:
    UserError: as `sparse_model`.
  """
  modes, speed, names = sweep.modes, sweep.speed, [ALL, *map(str, sweep.modes)]
  partitioner = loaded.model.partitioner
  config = dataclasses.replace(loaded.experiment.model, layers=loaded.model.config.layers)
  models = dict(zip(names, [inference_model(config, partitioner, mode) for mode in (None, *modes)], strict=True))
  rows = []
  for (name, model), mode in zip(models.items(), (None, *modes), strict=True):
    progress.stage(f"score {name}")
    threshold = mode.value if mode and "threshold" in mode.mode else None
    rows.append({"mode": name} | _scored(model, threshold, loaded.parameters, corpus, loaded.experiment))
  for row in rows:
    row["perplexity_increase"] = row["perplexity"] / rows[0]["perplexity"] - 1.0
  if speed is not None:
    members = {name: (model, loaded.parameters) for name, model in models.items()}
    for name, measured in decode_speeds(members, corpus, loaded.experiment, speed, progress).items():
      rows[names.index(name)]["tokens_per_s"] = measured
  within = [row for row in rows if row["perplexity_increase"] <= sweep.max_increase]
  chosen = min(within, key=lambda row: row["parameters_active"])
  assert config.moe
  return {
    "step": loaded.step,
    "num_experts": config.moe.num_experts,
    "attention_experts": config.attention_experts,
    "max_increase": sweep.max_increase,
    "chosen": chosen["mode"],
    "modes": rows,
  }


def _scored(
  model: AbstractModel, threshold: float | None, parameters: Parameters, corpus: Corpus, experiment: Experiment
) -> dict[str, Any]:
  """Perplexity of the held-out text, and the experts that it took."""

  def score(parameters: Parameters, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    transformer = model.module(parameters)
    x_BTD, counts = transformer(batch["tokens"], batch["segments"], batch["positions"])
    loss_BT = transformer.score(x_BTD, batch["targets"]).loss_BT
    nats = jnp.sum(jnp.where(batch["weights"] > 0, loss_BT, 0.0))
    return nats, experts_used(counts, threshold)

  placement = model.partitioner
  scorer = jax.jit(
    score,
    in_shardings=(model.shardings, dict.fromkeys(BATCH_TYPES, placement.batch)),
    out_shardings=placement.replicated,
  )
  nats, targets = 0.0, 0
  used: dict[str, Any] = {}
  for batch in held_out_batches(corpus, experiment):
    placed = to_devices({name: batch[name] for name in BATCH_TYPES}, placement.batch)
    of_batch, counted = jax.device_get(scorer(parameters, placed))
    nats, targets = nats + float(of_batch), targets + int((batch["weights"] > 0).sum())
    used = {kind: used.get(kind, 0.0) + np.float64(sums) for kind, sums in counted.items()}
  assert model.config.moe
  means = {kind: sums_3L[1:] / sums_3L[0] for kind, sums_3L in used.items()}
  stdevs = {kind: np.sqrt(np.maximum(squares_L - mean_L**2, 0.0)) for kind, (mean_L, squares_L) in means.items()}
  leaves = jax.tree_util.tree_leaves_with_path(model.parameters)
  total = sum(math.prod(leaf.shape) for _, leaf in leaves)
  of_experts = sum(math.prod(leaf.shape) for path, leaf in leaves if "experts" in [key.key for key in path])
  active = total - of_experts * (1.0 - float(np.mean(means[EXPERTS][0])) / model.config.moe.num_experts)
  found = {
    "perplexity": math.exp(nats / targets),
    "parameters_active": round(active),
    "active_fraction": active / total,
  }
  for kind, name in ((EXPERTS, "experts_per_token"), (HEADS, "attention_experts_above_threshold")):
    if kind in means:
      found |= {name: means[kind][0].tolist(), f"{name}_stdev": stdevs[kind].tolist()}
  return found


def experts_used(counts: dict[str, RouterCounts], threshold: float | None) -> dict[str, jax.Array]:
  """For each kind of router an array [3, L]: tokens, the sum over tokens of the number of experts, and of its square.
  The experts of attention are those whose probability is above `threshold` / their number; None does not count them.

  In inference, counts are of single tokens.
  """
  number_LOM = {EXPERTS: jnp.sum(counts[EXPERTS]["choices"], axis=-1)}
  if HEADS in counts and threshold is not None:
    probs_LOME = counts[HEADS]["probs"]  # 0 for padding
    number_LOM[HEADS] = jnp.sum(probs_LOME * probs_LOME.shape[-1] > threshold, axis=-1, dtype=jnp.float32)
  return {
    kind: jnp.stack([jnp.sum(x_LOM, axis=(1, 2)) for x_LOM in (counts[kind]["tokens"], n_LOM, n_LOM**2)])
    for kind, n_LOM in number_LOM.items()
  }
