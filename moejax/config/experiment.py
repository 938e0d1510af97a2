"""An experiment (one run) and a suite (a comparison of runs)."""

import dataclasses
from typing import Literal, get_args

from moejax.config import checks
from moejax.config.data import Data
from moejax.config.model import Model
from moejax.config.optimizer import Optimizer
from moejax.config.resume import MAY_CHANGE, RUN_MAY_CHANGE
from moejax.config.sharding import DATA_EXPERT_MODEL, Mesh, Rules, check_dimensions, shards, table
from moejax.config.tensors import check_activations, check_parameters
from moejax.config.training import Training
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """What is scored: bits per byte and next-token accuracy on held-out text, and benchmarks."""

  batch_size: int = 16
  """Sequences in one evaluation step, over all devices."""
  max_tokens: int | None = 1_000_000
  """Held-out tokens that are scored, the first of a fixed shuffled order of documents; None scores all."""
  every: int | None = None
  """Steps between two evaluations during training; None evaluates at the end only."""
  tasks: tuple[str, ...] = ()
  """Benchmarks of lm-evaluation-harness, and suites of them such as core_en, that are asked beside."""
  task_limit: int | None = None
  """Examples of each benchmark, the first; None asks all."""
  task_data: str | None = None
  """Folder with the benchmarks' data as TASK/SPLIT.jsonl; None leaves to the harness where it comes from."""
  allow_cut_prompts: bool = False
  """Whether a benchmark is asked most of whose few-shot prompts do not fit data.sequence_length; they are then cut from
  the left and lose examples. Cut prompts are counted in the results either way."""

  def __post_init__(self):
    checks.positive(self, "batch_size")
    for name in ("max_tokens", "every", "task_limit"):
      if getattr(self, name) is not None:
        checks.positive(self, name)


MATCHABLE = (
  "model.moe.d_ff", "model.d_ff", "model.moe.num_experts", "model.moe.every", "model.moe.capacity_factor",
  "model.num_layers",
)  # fmt: skip
"""Fields that step time grows or falls with, so that one value of them has a given step time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """One run: everything that decides its result, and nothing else."""

  name: str
  """Its name in the list, in reports and on disk."""
  model: Model
  """The transformer."""
  data: Data
  """The text."""
  training: Training
  """Length, batch, losses, checkpoints."""
  optimizer: Optimizer
  """The optimizer and its schedule."""
  evaluation: Evaluation = dataclasses.field(default=Evaluation(), metadata=RUN_MAY_CHANGE)
  """What is scored on held-out text and on benchmarks."""
  mesh: Mesh = dataclasses.field(default=Mesh(), metadata=RUN_MAY_CHANGE)
  """Devices along each axis."""
  rules: Rules = dataclasses.field(default=DATA_EXPERT_MODEL, metadata=RUN_MAY_CHANGE)
  """Which mesh axes shard which logical axis."""
  free: tuple[str, ...] = dataclasses.field(default=("model.moe.d_ff",), metadata=MAY_CHANGE)
  """Fields of an MoE experiment that `moejax match` may vary, in this order, to reach a dense model's step time."""

  def __post_init__(self):
    for field in self.free:
      if field not in MATCHABLE:
        raise UserError(f"free={field!r} is no field that match can vary; there are {', '.join(MATCHABLE)}")
    self._check_free()
    if self.model.moe:
      self.model.moe.check_combinations()
    self._check_losses()
    self._check_sharding()

  def _check_free(self):
    """A field of layers that the model lacks has no step time to vary; the default is for experiments of both kinds."""
    if "model.d_ff" in self.free and self.model.num_sparse_layers == self.model.num_layers:
      raise UserError("free='model.d_ff' and every layer is sparse, so that it would vary nothing; use model.moe.d_ff")

  def _check_losses(self):
    for name, coefficient in dataclasses.asdict(self.training.losses).items():
      if not coefficient or name == "z" or name in self.model.auxiliary_losses:
        continue
      if name == "attention_mutual_information":
        why, remedy = "model.attention_experts is None", "give the model attention experts"
      elif self.model.moe is None:
        why, remedy = "no layer is sparse", "give the model a moe"
      else:
        why = f"router.kind={self.model.moe.router.kind!r} loads all experts alike"
        remedy = "use another router"
      raise UserError(
        f"training.losses.{name}={coefficient} and {why}, so it would do nothing; set it to 0 or {remedy}"
      )

  def _check_sharding(self):
    """The rules place every tensor, as far as the open data axis allows to know."""
    table(self.rules)
    batches = {
      "training.batch_size / gradient_accumulation": self.micro_batch_size,
      "evaluation.batch_size": self.evaluation.batch_size,
    }
    for field, batch in batches.items():
      check_dimensions(field, {"batch": batch}, self.rules, self.mesh)
    check_parameters(self.model, self.rules, self.mesh)
    for field, batch in batches.items():
      check_activations(field, self.model, batch, self.data.sequence_length, self.rules, self.mesh)

  @property
  def cautions(self) -> tuple[str, ...]:
    """What a user should know before training this, a line each."""
    found = list(self.model.moe.cautions if self.model.moe else ())
    parts, of_whole_batch = self.training.gradient_accumulation, self.training.losses.of_whole_batch
    if parts > 1 and of_whole_batch:
      found.append(
        f"training.gradient_accumulation={parts} with training.losses.{of_whole_batch[0]}: each part is computed "
        "forwards once more, about a third of the step's work, because the loss is taken over the whole batch"
      )
    if self.model.moe and shards(self.rules, self.mesh, "experts") == 1:
      found += [
        f"moe.{name}={value} does nothing with mesh ({self.mesh}), on which no rows are exchanged"
        for name, value in (("receive_factor", self.model.moe.receive_factor), ("exchange", self.model.moe.exchange))
        if value not in (None, "all_to_all")
      ]
    return tuple(found)

  @property
  def micro_batch_size(self) -> int:
    """Sequences that are computed at once."""
    return self.training.batch_size // self.training.gradient_accumulation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
  """How step times are measured: members take turns, so that drift of the machine hits all alike."""

  warmup_steps: int = 3
  """Steps of each member that are not counted."""
  rounds: int = 5
  """Turns of each member."""
  steps_per_round: int = 8
  """Steps in a turn; the step time is the median over all turns."""

  def __post_init__(self):
    checks.positive(self, "warmup_steps", "rounds", "steps_per_round")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
  """A dense experiment and the MoE candidates for its step time."""

  dense: Experiment
  """The reference, whose compute-optimal training time is the budget of the pair."""
  candidates: tuple[Experiment, ...]
  """MoE experiments; the one whose step time is nearest is the match."""

  def __post_init__(self):
    if self.dense.model.moe is not None:
      raise UserError(f"the dense member {self.dense.name!r} of a pair has sparse layers; set model.moe to None")
    if not self.candidates:
      raise UserError(f"the pair of {self.dense.name!r} has no candidates; give it at least one MoE experiment")
    for experiment in self.candidates:
      if experiment.model.moe is None:
        raise UserError(f"candidate {experiment.name!r} for {self.dense.name!r} has no sparse layer; give it a moe")
      if dataclasses.replace(experiment.data, prefetch=self.dense.data.prefetch) != self.dense.data:
        raise UserError(f"candidate {experiment.name!r} reads other data than {self.dense.name!r}; use the same data")


Train = Literal["all", "matched"]

OF_THE_TEXT = (
  ("data", "train"), ("data", "weights"), ("data", "validation"), ("data", "validation_fraction"),
  ("data", "text_field"), ("data", "tokenizer"), ("evaluation", "max_tokens"), ("evaluation", "tasks"),
  ("evaluation", "task_limit"), ("evaluation", "task_data"),
)  # fmt: skip
"""Fields that all members of a suite share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
  """A comparison at equal step time."""

  name: str
  """Its name in the list and in reports."""
  pairs: tuple[Pair, ...]
  """Dense scales, each with its candidates."""
  tolerance: float = 0.05
  """Largest relative difference of two step times that count as equal."""
  train: Train = "all"
  """all trains every candidate for its pair's time budget, matched only the nearest of each pair."""
  measurement: Measurement = Measurement()
  """How step times are measured."""

  def __post_init__(self):
    checks.one_of(self, "train", get_args(Train))
    checks.between(self, "tolerance", 0.0, 1.0)
    names = [experiment.name for experiment in self.members]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
      raise UserError(f"suite {self.name!r} has two members named {', '.join(repeated)}; names must differ")
    self._check_text()

  def _check_text(self):
    """All members read one text and are scored on one part of it, which a comparison prepares once."""
    for experiment in self.members[1:]:
      first = self.members[0]
      for group, name in OF_THE_TEXT:
        there, here = (getattr(getattr(member, group), name) for member in (first, experiment))
        if there != here:
          raise UserError(
            f"suite {self.name!r}: {group}.{name} is {there!r} in {first.name!r} and {here!r} in {experiment.name!r}; "
            "a comparison has one text"
          )

  @property
  def members(self) -> tuple[Experiment, ...]:
    """All experiments, each dense one before its candidates."""
    return tuple(experiment for pair in self.pairs for experiment in (pair.dense, *pair.candidates))
