"""Training length, batch size, losses and checkpoints."""

import dataclasses
from typing import Literal, get_args

from moejax.config import checks
from moejax.config.resume import MAY_CHANGE, RUN_MAY_CHANGE

Counted = Literal["total", "non_embedding", "active", "active_non_embedding"]
Then = Literal["stop", "rewind"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
  """Coefficients of the losses that are added to the cross-entropy. 0 disables a loss."""

  z: float = 0.0
  """z-loss: squared log-normalizer of the output logits (PaLM, arXiv 2204.02311, section 5)."""
  load_balance: float = 0.0
  """Load-balancing loss (GShard, arXiv 2006.16668): E times the sum over experts of the fraction of choices times the
  mean probability; 1 if balanced. It is computed in each routing group of moe.group_size tokens and averaged, and is
  the same on every mesh. Other frameworks compute it per micro-batch of a device."""
  sequence_balance: float = 0.0
  """Load-balancing loss computed in each sequence (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20)."""
  global_balance: float = 0.0
  """Load-balancing loss computed over the whole batch of all devices, so that a sequence about one topic may use few
  experts (arXiv 2501.11873)."""
  router_z: float = 0.0
  """Router z-loss: squared log-normalizer of the router logits (ST-MoE, arXiv 2202.08906, equation 5)."""
  mutual_information: float = 0.0
  """Mutual-information loss: mean entropy of the router probabilities of a token minus the entropy of their mean. It is
  lowest if each token prefers few experts and all experts are used (DS-MoE, arXiv 2404.05567, equation 5)."""
  attention_mutual_information: float = 0.0
  """Mutual-information loss of the routers of model.attention_experts."""
  multi_token: float = 0.0
  """Multi-token prediction: mean cross-entropy of the modules of model.multi_token_depth, each averaged over its
  targets. DeepSeek-V3: 0.3, later 0.1 (arXiv 2412.19437, equation 25)."""
  depths: float = 0.0
  """Loss of model.depths. top_k: cross-entropy of the predictor of the choice of a token, which affects no other
  parameter. threshold: fraction of chosen tokens times the mean gate, which lowers their number (MoDification:
  0.01)."""

  def __post_init__(self) -> None:
    checks.not_negative(self, *(field.name for field in dataclasses.fields(self)))

  @property
  def of_whole_batch(self) -> tuple[str, ...]:
    """Losses with a coefficient that are not sums over tokens, so that their gradients depend on the whole batch."""
    names = ("global_balance", "mutual_information", "attention_mutual_information")
    return tuple(name for name in names if getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """Compute-optimal training length: tokens = tokens_per_parameter x parameters (Chinchilla, arXiv 2203.15556)."""

  tokens_per_parameter: float = 20.0
  """Number of training tokens per parameter."""
  parameters: Counted = "total"
  """Which parameters are counted."""

  def __post_init__(self) -> None:
    checks.positive(self, "tokens_per_parameter")
    checks.one_of(self, "parameters", get_args(Counted))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
  """When checkpoints are saved. The last step is always saved."""

  every: int = 1000
  """Number of steps between checkpoints."""
  every_minutes: float | None = None
  """Number of minutes between checkpoints, in addition to `every`. None: only `every` applies."""
  keep_last: int = 2
  """Number of latest checkpoints to keep."""
  keep_best: int = 0
  """Number of checkpoints with the lowest held-out bits per byte to keep, in addition to the latest. It needs
  evaluation.every, since only evaluated steps are compared."""
  keep_every: int | None = None
  """Checkpoints at multiples of this number of steps are never deleted. None keeps only the latest."""

  def __post_init__(self) -> None:
    checks.positive(self, "every", "keep_last")
    checks.not_negative(self, "keep_best")
    if self.every_minutes is not None:
      checks.positive(self, "every_minutes")
    if self.keep_every is not None:
      checks.positive(self, "keep_every")
      checks.divides(self.every, "checkpoints.every", self.keep_every, "checkpoints.keep_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anomalies:
  """Steps whose loss or gradient norm is NaN or infinite, or whose loss is a spike. Their update is skipped."""

  max_skipped: int = dataclasses.field(default=3, metadata=RUN_MAY_CHANGE)
  """Maximum number of consecutive steps that are skipped before `then` applies."""
  then: Then = dataclasses.field(default="stop", metadata=RUN_MAY_CHANGE)
  """stop: end the run with an error. rewind: continue from the newest checkpoint with the data after the skipped
  batches."""
  spike: float | None = None
  """Skip a step whose loss is this number of standard deviations above the mean of about 50 previous steps. None
  accepts every finite loss."""

  def __post_init__(self) -> None:
    checks.not_negative(self, "max_skipped")
    checks.one_of(self, "then", get_args(Then))
    if self.spike is not None:
      checks.positive(self, "spike")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
  """One training run."""

  batch_size: int
  """Number of sequences per step, over all devices (B)."""
  steps: int | None = None
  """Number of optimizer steps. If None, the budget determines it."""
  budget: Budget = Budget()
  """Training length if steps is None."""
  gradient_accumulation: int = 1
  """Number of microbatches that a batch is split into, to save memory. It does not change losses, gradients or router
  metrics. With global_balance or a mutual-information loss, whose gradients need sums over the whole batch, each
  microbatch needs an additional forward pass, which makes a step about a third slower."""
  seed: int = 0
  """Seed for initializing the parameters."""
  losses: Losses = Losses()
  """Auxiliary losses."""
  checkpoints: Checkpoints = dataclasses.field(default=Checkpoints(), metadata=MAY_CHANGE)
  """When checkpoints are saved and how many are kept."""
  anomalies: Anomalies = Anomalies()
  """How steps are handled whose loss or gradient is not finite, or whose loss is a spike."""
  log_every: int = dataclasses.field(default=10, metadata=MAY_CHANGE)
  """Number of steps between logged metrics."""

  def __post_init__(self) -> None:
    checks.positive(self, "batch_size", "gradient_accumulation", "log_every")
    checks.seed(self, "seed")
    if self.steps is not None:
      checks.positive(self, "steps")
    checks.divides(self.gradient_accumulation, "training.gradient_accumulation", self.batch_size, "training.batch_size")
