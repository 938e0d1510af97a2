"""An experiment (one run) and a suite (a comparison of runs)."""

import dataclasses
import math
from typing import Literal, get_args

from moejax.config import checks
from moejax.config.data import SEQIO, Data
from moejax.config.kinds import described, running
from moejax.config.learning_rates import GivenLearningRates, LearningRates
from moejax.config.model import Model
from moejax.config.optimizer import LoRA, Optimizer
from moejax.config.plain import check_storable
from moejax.config.resume import MAY_CHANGE, RUN_MAY_CHANGE
from moejax.config.schedule import WarmupStableDecay
from moejax.config.sharding import DATA_EXPERT_MODEL, Mesh, Rules, check_dimensions, shards, table
from moejax.config.tensors import check_activations, check_parameters
from moejax.config.training import Training
from moejax.config.upcycled import Upcycled, check_convertible
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """Evaluation on held-out text (bits per byte and next-token accuracy) and on benchmarks."""

  batch_size: int = 16
  """Number of sequences per evaluation step, over all devices."""
  max_tokens: int | None = 1_000_000
  """Number of held-out tokens to score, from documents in a fixed random order. None scores all."""
  every: int | None = None
  """Number of training steps between evaluations. None evaluates only after the last step."""
  tasks: tuple[str, ...] = ()
  """lm-evaluation-harness benchmarks to run as well, or suites of them such as core_en."""
  task_limit: int | None = None
  """Number of examples per benchmark, counted from the first. None uses all."""
  task_data: str | None = None
  """Folder with the data of the benchmarks as TASK/SPLIT.jsonl. If None, the harness loads it."""
  allow_cut_prompts: bool = False
  """Whether to run a benchmark if most of its few-shot prompts are longer than data.sequence_length. Such prompts are
  truncated from the left and lose examples. The results count truncated prompts in either case."""

  def __post_init__(self) -> None:
    checks.positive(self, "batch_size")
    for name in ("every", "task_limit"):
      if getattr(self, name) is not None:
        checks.positive(self, name)
    if self.max_tokens is not None:
      checks.positive(self, "max_tokens", largest=checks.LARGEST_INTEGER)


MATCHABLE_FIELDS = (
  "model.moe.d_ff", "model.d_ff", "model.moe.num_experts", "model.moe.every", "model.moe.capacity_factor",
  "model.num_layers", "model.depths.share",
)  # fmt: skip
"""Fields that `moejax match` can vary. Step time increases with each of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """The configuration of one run: model, text, training, evaluation and sharding."""

  name: str
  """Name in `moejax list`, in reports and on disk."""
  model: Model
  """The transformer."""
  data: Data
  """The text and its packing into sequences."""
  training: Training
  """Training length, batch size, losses and checkpoints."""
  optimizer: Optimizer
  """The optimizer and its learning rate schedule."""
  evaluation: Evaluation = dataclasses.field(default=Evaluation(), metadata=RUN_MAY_CHANGE)
  """Evaluation on held-out text and on benchmarks."""
  mesh: Mesh = dataclasses.field(default=Mesh(), metadata=RUN_MAY_CHANGE)
  """Number of devices along each mesh axis."""
  rules: Rules = dataclasses.field(default=DATA_EXPERT_MODEL, metadata=RUN_MAY_CHANGE)
  """Which mesh axes shard each logical axis."""
  matchable: tuple[str, ...] = dataclasses.field(default=("model.moe.d_ff",), metadata=MAY_CHANGE)
  """Fields of an MoE experiment that `moejax match` varies, in this order, to match the step time of a dense model."""

  def __post_init__(self) -> None:
    check_storable(self)
    checks.file_name(self, "name")
    for field in self.matchable:
      if field not in MATCHABLE_FIELDS:
        raise UserError(
          f"matchable={field!r} is not a field that match can vary; use one of {', '.join(MATCHABLE_FIELDS)}"
        )
    self._check_matchable()
    if self.model.moe:
      self.model.moe.check_combinations()
    checks.divides(self.model.logit_chunks, "model.logit_chunks", self.data.sequence_length, "data.sequence_length")
    self._check_counts()
    self._check_losses()
    self._check_multi_token()
    self._check_depths()
    if (best := self.training.checkpoints.keep_best) and self.evaluation.every is None:
      raise UserError(
        f"training.checkpoints.keep_best={best} would have no effect: evaluation.every is None, so that only the last "
        "step is evaluated; set evaluation.every"
      )
    if isinstance(self.optimizer, LoRA) and self.optimizer.routers and not self.model.moe:
      raise UserError(
        "optimizer.routers=True would have no effect: no layer is sparse; set it to False or set model.moe"
      )
    if unread := self.model.unread_activations:
      raise UserError(
        f"model.save_activations={' '.join(unread)} would have no effect because the backward pass of no layer of this "
        "model reads these values; remove them"
      )
    self._check_schedule()
    self._check_sharding()

  def _check_matchable(self) -> None:
    """Checks that the matchable fields affect the model. The default, model.moe.d_ff, is also valid for dense
    models."""
    if "model.d_ff" in self.matchable and self.model.num_sparse_layers == self.model.num_layers:
      raise UserError("matchable='model.d_ff' would have no effect because every layer is sparse; use model.moe.d_ff")

  def _check_counts(self) -> None:
    """Checks that int32 counts the tokens of a batch and their choices of experts."""
    moe, length = self.model.moe, self.data.sequence_length
    choices = 1 if moe is None else moe.num_experts if moe.router.every_expert else moe.experts_per_token
    for name, batch in (("training", self.training.batch_size), ("evaluation", self.evaluation.batch_size)):
      if batch * length * choices > checks.LARGEST_COUNT:
        of_experts = f" and {choices} experts for each token" if choices > 1 else ""
        raise UserError(
          f"{name}.batch_size={batch} with data.sequence_length={length}{of_experts} has {batch * length * choices} to "
          f"count in one batch, and may have at most {checks.LARGEST_COUNT}; lower {name}.batch_size"
        )

  def _check_losses(self) -> None:
    for name, coefficient in dataclasses.asdict(self.training.losses).items():
      if not coefficient or name == "z" or name in self.model.auxiliary_losses:
        continue
      if name == "attention_mutual_information":
        why, remedy = "model.attention_experts is None", "set model.attention_experts"
      elif name == "multi_token":
        why, remedy = "model.multi_token_depth is 0", "set model.multi_token_depth"
      elif name == "depths":
        why, remedy = "model.depths.kind is all", "set model.depths.kind"
      elif self.model.moe is None:
        why, remedy = "no layer is sparse", "set model.moe"
      else:
        why = f"router.kind={self.model.moe.router.kind!r} always balances the load"
        remedy = "use another router"
      raise UserError(f"training.losses.{name}={coefficient} would have no effect: {why}; set it to 0 or {remedy}")

  def _check_multi_token(self) -> None:
    """Checks that the loss of multi-token prediction has targets and a coefficient."""
    depth, length = self.model.multi_token_depth, self.data.sequence_length
    if depth and not self.training.losses.multi_token:
      raise UserError(
        f"model.multi_token_depth={depth} would have no effect with training.losses.multi_token=0; set it, such as to "
        "0.3, or the depth to 0"
      )
    if depth and length <= depth:
      raise UserError(
        f"model.multi_token_depth={depth} needs sequences of at least {depth + 1} tokens, but data.sequence_length="
        f"{length}, so that its loss would have no target; raise data.sequence_length or lower the depth"
      )

  def _check_depths(self) -> None:
    """Checks that a mixture of depths is one for training, and that its predictor is trained."""
    depths = self.model.depths
    if depths.has_predictor and depths.causal() == depths:
      raise UserError(f"model.depths.kind={depths.kind} is not for training; use top_k or threshold")
    if depths.has_predictor and not self.training.losses.depths:
      raise UserError(
        f"model.depths.kind={depths.kind} with training.losses.depths=0 would not train the predictor, which "
        "evaluation and text generation need; set it, such as to 0.01"
      )

  def _check_schedule(self) -> None:
    """Checks a few learning rates, which a user's own schedule may compute."""
    schedule = self.optimizer.schedule
    for step in (0, 500, 999):
      with running(schedule):
        fraction = schedule.fraction(step, 1000)
        usable = 0.0 <= float(fraction) < math.inf
      if not usable:
        raise UserError(
          f"{described(type(schedule))} returned {fraction} for step {step} of 1000; a fraction of the peak learning "
          "rate must be finite and 0 or above"
        )

  def _check_sharding(self) -> None:
    """Checks that the rules can shard every tensor. If mesh.data is None, it counts as 1."""
    table(self.rules)
    batches = {
      "training.batch_size / gradient_accumulation": self.micro_batch_size,
      "evaluation.batch_size": self.evaluation.batch_size,
    }
    for field, batch in batches.items():
      check_dimensions(field, {"batch": batch}, self.rules, self.mesh)
    check_parameters(self.model, self.rules, self.mesh)
    depths = self.model.depths.causal()
    evaluated = self.model if depths == self.model.depths else dataclasses.replace(self.model, depths=depths)
    for (field, batch), model in zip(batches.items(), (self.model, evaluated), strict=True):
      check_activations(field, model, batch, self.data.sequence_length, self.rules, self.mesh)

  @property
  def offload_fields(self) -> tuple[str, ...]:
    """The fields by which a training step keeps arrays in the memory of the host."""
    fields = {
      "model.offload_activations": self.model.offload_activations,
      "optimizer.offload_moments": self.optimizer.offload_moments,
    }
    return tuple(name for name, value in fields.items() if value)

  @property
  def cautions(self) -> tuple[str, ...]:
    """Warnings to show before training, one line each."""
    found = list(self.model.moe.cautions if self.model.moe else ())
    parts, of_whole_batch = self.training.gradient_accumulation, self.training.losses.of_whole_batch
    if parts > 1 and of_whole_batch:
      found.append(
        f"training.gradient_accumulation={parts} with training.losses.{of_whole_batch[0]} needs an additional forward "
        "pass of each microbatch, which makes a step about a third slower, because the loss depends on the whole batch"
      )
    if self.model.moe and shards(self.rules, self.mesh, "experts") == 1:
      found += [
        f"dispatch.{name}={value} has no effect with mesh ({self.mesh}), because no rows are exchanged between devices"
        for name, value in self.model.moe.dispatch.exchange_fields.items()
      ]
    return tuple(found)

  def branch_name(self, fraction: float) -> str:
    """Name of the run of this experiment with a fraction of its budget."""
    return f"{self.name}-at-{fraction:g}"

  @property
  def micro_batch_size(self) -> int:
    """Number of sequences per microbatch."""
    return self.training.batch_size // self.training.gradient_accumulation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
  """How step times are measured. Members take turns, so that changes in machine speed affect all of them equally. Each
  pair is measured until the confidence intervals of its step time ratios are narrower than the tolerance."""

  warmup_steps: int = 3
  """Number of steps per member before timing starts."""
  rounds: int = 5
  """Minimum number of turns per member."""
  max_rounds: int | None = None
  """Maximum number of turns per member. None: 8 times the minimum."""
  steps_per_round: int = 8
  """Number of steps per turn. The step time of a turn is the median."""

  def __post_init__(self) -> None:
    checks.positive(self, "warmup_steps", "rounds", "steps_per_round")
    if self.max_rounds is not None and self.max_rounds < self.rounds:
      raise UserError(
        f"measurement.max_rounds={self.max_rounds} must be at least measurement.rounds={self.rounds}; raise it, or use "
        "None"
      )

  @property
  def round_limit(self) -> int:
    """Maximum number of turns per member."""
    return 8 * self.rounds if self.max_rounds is None else self.max_rounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
  """A dense experiment, and MoE candidates that may have the same step time."""

  dense: Experiment
  """The dense experiment. Its compute-optimal training time is the budget of the pair."""
  candidates: tuple[Experiment, ...]
  """MoE experiments, or dense ones with a mixture of depths. The one with the closest step time is the match."""
  seeds: int = 1
  """Number of runs of each member. They have successive values of training.seed and data.seed."""
  upcycled: tuple[Upcycled, ...] = ()
  """The candidates that start from the trained dense experiment. The others start from random parameters."""

  def __post_init__(self) -> None:
    checks.positive(self, "seeds")
    if self.dense.model.moe is not None:
      raise UserError(f"the dense member {self.dense.name!r} of a pair has sparse layers; set model.moe to None")
    if not self.dense.model.is_dense:
      kind = self.dense.model.depths.kind
      raise UserError(f"the dense member {self.dense.name!r} of a pair has model.depths.kind={kind}; set it to all")
    if not self.candidates:
      raise UserError(f"the pair of {self.dense.name!r} has no candidates; give it at least one MoE experiment")
    for experiment in self.candidates:
      if experiment.model.is_dense:
        raise UserError(
          f"candidate {experiment.name!r} for {self.dense.name!r} has no sparse layer; set model.moe, or a mixture of "
          "depths (model.depths)"
        )
      if dataclasses.replace(experiment.data, prefetch=self.dense.data.prefetch) != self.dense.data:
        raise UserError(
          f"candidate {experiment.name!r} does not read the same data as {self.dense.name!r}; use the same data"
        )
    self._check_upcycled()

  def _check_upcycled(self) -> None:
    candidates = {experiment.name: experiment for experiment in self.candidates}
    names = [each.candidate for each in self.upcycled]
    for name in names:
      if name not in candidates:
        raise UserError(
          f"upcycled {name!r} is not a candidate for {self.dense.name!r}; its candidates are {', '.join(candidates)}"
        )
      if names.count(name) > 1:
        raise UserError(f"upcycled {name!r} is given {names.count(name)} times for {self.dense.name!r}; give it once")
      check_convertible(name, self.dense.model, candidates[name].model)

  def start(self, member: str) -> Upcycled | None:
    """How a member starts from the dense experiment, or None if it starts from random parameters."""
    return next((each for each in self.upcycled if each.candidate == member), None)

  @property
  def members(self) -> tuple[Experiment, ...]:
    """The dense experiment, followed by its candidates."""
    return self.dense, *self.candidates

  def runs(self, member: Experiment) -> tuple[Experiment, ...]:
    """The runs of a member. The first is the member itself, and the others have their seed in the name."""
    return (member, *(_with_seed(member, i) for i in range(1, self.seeds)))


def _with_seed(experiment: Experiment, i: int) -> Experiment:
  """The experiment with initial parameters and an order of the text that differ from those of its first run."""
  seed = experiment.training.seed + i
  return dataclasses.replace(
    experiment,
    name=f"{experiment.name}-seed{seed}",
    training=dataclasses.replace(experiment.training, seed=seed),
    data=dataclasses.replace(experiment.data, seed=experiment.data.seed + i),
  )


Train = Literal["all", "matched"]

OF_THE_TEXT = (
  ("data", "train"), ("data", "weights"), ("data", "validation"), ("data", "validation_fraction"),
  ("data", "text_field"), ("data", "on_error"), ("data", "document_length"), ("data", "deduplicate"),
  ("data", "tokenizer"),
  ("evaluation", "max_tokens"), ("evaluation", "tasks"), ("evaluation", "task_limit"), ("evaluation", "task_data"),
)  # fmt: skip
"""Fields that must be equal in all members of a suite."""

OF_SEQIO_TEXT = (("data", "sequence_length"),)
"""Fields that must also be equal if the text comes from seqio, whose preprocessors may read them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
  """A comparison at equal step time."""

  name: str
  """Name in `moejax list` and in reports."""
  pairs: tuple[Pair, ...]
  """Dense experiments of different sizes, each with its MoE candidates."""
  tolerance: float = 0.05
  """Maximum relative difference between two step times that are considered equal."""
  train: Train = "all"
  """all: train every candidate for the time budget of its pair. matched: train only the match of each pair."""
  measurement: Measurement = Measurement()
  """How step times are measured."""
  learning_rates: LearningRates = GivenLearningRates()
  """How the learning rate of each member is chosen."""
  shorter_budgets: tuple[float, ...] = ()
  """Fractions of the training budget after which members are compared as well, from the same runs: at each of them, a
  branch of a run decays the learning rate. The schedule of all members must be WarmupStableDecay."""

  def __post_init__(self) -> None:
    checks.one_of(self, "train", get_args(Train))
    checks.between(self, "tolerance", 0.0, 1.0)
    if not self.pairs:
      raise UserError(f"suite {self.name!r} has no pairs; give it at least one")
    names = [run.name for pair in self.pairs for member in pair.members for run in pair.runs(member)]
    names += [member.branch_name(f) for member in self.members for f in self.shorter_budgets]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
      raise UserError(f"suite {self.name!r} has two members named {', '.join(repeated)}; names must differ")
    self._check_text()
    self._check_shorter_budgets()
    check_storable(self)

  def _check_shorter_budgets(self) -> None:
    for each in (each for pair in self.pairs for each in pair.upcycled):
      if each.parent_fraction < 1.0 and each.parent_fraction not in self.shorter_budgets:
        raise UserError(
          f"upcycled {each.candidate!r}: parent_fraction={each.parent_fraction} is not among "
          f"shorter_budgets={self.shorter_budgets}, after which there are runs of the dense model; add it to "
          "shorter_budgets, or use parent_fraction=1 with count_parent=False"
        )
    for fraction in self.shorter_budgets:
      if not 0.0 < fraction < 1.0:
        raise UserError(f"shorter_budgets={fraction} must be above 0 and below 1, the whole budget")
    for member in self.members if self.shorter_budgets else ():
      if not isinstance(member.optimizer.schedule, WarmupStableDecay):
        raise UserError(
          f"shorter_budgets={self.shorter_budgets} needs a stable learning rate, but optimizer.schedule of "
          f"{member.name!r} is {member.optimizer.schedule.kind}; use WarmupStableDecay"
        )

  def _check_text(self) -> None:
    """Checks that all members have the same text, which a comparison prepares once."""
    first = self.members[0]
    from_seqio = any(source.startswith(SEQIO) for source in first.data.train + first.data.validation)
    for experiment in self.members[1:]:
      for group, name in OF_THE_TEXT + (OF_SEQIO_TEXT if from_seqio else ()):
        there, here = (getattr(getattr(member, group), name) for member in (first, experiment))
        if there != here:
          raise UserError(
            f"suite {self.name!r}: {group}.{name} is {there!r} in {first.name!r} but {here!r} in {experiment.name!r}; "
            "all members must have the same text"
          )

  @property
  def upcycled(self) -> dict[str, Upcycled]:
    """How each upcycled candidate starts, by name."""
    return {each.candidate: each for pair in self.pairs for each in pair.upcycled}

  @property
  def members(self) -> tuple[Experiment, ...]:
    """All experiments. Each dense experiment is followed by its candidates."""
    return tuple(experiment for pair in self.pairs for experiment in pair.members)
