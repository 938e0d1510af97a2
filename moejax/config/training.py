"""How long, on what batch and with which losses a model is trained."""

import dataclasses
from typing import Literal, get_args

from moejax.config import checks
from moejax.config.resume import MAY_CHANGE

Counted = Literal["total", "non_embedding", "active", "active_non_embedding"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
  """Coefficients of what is added to the cross-entropy; 0 leaves a loss out."""

  z: float = 0.0
  """Squared log-normaliser of the logits (PaLM, arXiv 2204.02311, section 5)."""
  load_balance: float = 0.0
  """Product of each expert's share of choices and mean probability, 1 when balanced, taken in each routing group of
  moe.group_size tokens and averaged (GShard, arXiv 2006.16668): what others take per micro-batch of a device, and here
  the same on every mesh."""
  sequence_balance: float = 0.0
  """The same taken in each sequence (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20)."""
  global_balance: float = 0.0
  """The same taken once over the whole batch of all devices, which lets a sequence of one kind of text use few experts
  (arXiv 2501.11873)."""
  router_z: float = 0.0
  """Squared log-normaliser of the router's logits (ST-MoE, arXiv 2202.08906, equation 5)."""
  mutual_information: float = 0.0
  """Mean entropy of a token's router probabilities minus the entropy of their mean: lowest where each token is sure of
  few experts and all are used (DS-MoE, arXiv 2404.05567, equation 5)."""
  attention_mutual_information: float = 0.0
  """The same of the routers of model.attention_experts."""

  def __post_init__(self):
    checks.not_negative(self, *(field.name for field in dataclasses.fields(self)))

  @property
  def of_whole_batch(self) -> tuple[str, ...]:
    """Those with a coefficient that are no sum over tokens, so that their slope depends on the whole batch."""
    names = ("global_balance", "mutual_information", "attention_mutual_information")
    return tuple(name for name in names if getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """Compute-optimal training length: tokens = multiple x parameters (Chinchilla, arXiv 2203.15556)."""

  tokens_per_parameter: float = 20.0
  """The multiple."""
  parameters: Counted = "total"
  """Which parameters count."""

  def __post_init__(self):
    checks.positive(self, "tokens_per_parameter")
    checks.one_of(self, "parameters", get_args(Counted))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
  """When the run is saved; the last step always is."""

  every: int = 1000
  """Steps between two checkpoints."""
  keep_last: int = 2
  """Newest checkpoints that are kept."""
  keep_every: int | None = None
  """Checkpoints at multiples of this many steps are kept for ever; None keeps only the newest."""

  def __post_init__(self):
    checks.positive(self, "every", "keep_last")
    if self.keep_every is not None:
      checks.positive(self, "keep_every")
      checks.divides(self.every, "checkpoints.every", self.keep_every, "checkpoints.keep_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
  """One training run."""

  batch_size: int
  """Sequences in a step, over all devices (B)."""
  steps: int | None = None
  """Optimizer steps; None takes what the budget gives."""
  budget: Budget = Budget()
  """Length of the run where steps is None."""
  gradient_accumulation: int = 1
  """Parts in which a batch is computed, one after the other, to save memory. Changes no loss, gradient or statistic.
  With global_balance or a mutual information every part is computed forwards once more before, about a third of the
  step's work: their gradients need the sums of the whole batch."""
  seed: int = 0
  """Seed of the initial parameters."""
  losses: Losses = Losses()
  """Auxiliary losses."""
  checkpoints: Checkpoints = dataclasses.field(default=Checkpoints(), metadata=MAY_CHANGE)
  """What is saved."""
  log_every: int = dataclasses.field(default=10, metadata=MAY_CHANGE)
  """Steps between two lines of metrics."""

  def __post_init__(self):
    checks.positive(self, "batch_size", "gradient_accumulation", "log_every")
    checks.not_negative(self, "seed")
    if self.steps is not None:
      checks.positive(self, "steps")
    checks.divides(self.gradient_accumulation, "training.gradient_accumulation", self.batch_size, "training.batch_size")
