"""Configurations of optimizers. `moejax/training/optimizers.py` builds them with optax."""

import dataclasses
from typing import Literal, get_args

from moejax.config import checks
from moejax.config.kinds import OfSeveralKinds
from moejax.config.resume import RUN_MAY_CHANGE
from moejax.config.schedule import Cosine, Schedule

MomentDtype = Literal["float32", "bfloat16"]
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(OfSeveralKinds, default="AdamW", functions="moejax.training.optimizers.OPTIMIZERS"):
  """Fields of every optimizer. `Optimizer(...)` returns `AdamW(...)`, the default. To add an optimizer, subclass this
  and add its function to `moejax.training.optimizers.OPTIMIZERS`."""

  learning_rate: float
  """Peak learning rate, reached after warm-up."""
  schedule: Schedule = Cosine()
  """How the learning rate changes over the run."""
  weight_decay: float = 0.1
  """Decoupled weight decay, multiplied by the learning rate. Applied to matrices, not to norm scales and router
  biases."""
  gradient_clip: float = 1.0
  """Maximum global norm of the gradient. Larger gradients are scaled down to it."""

  offload_moments: bool = dataclasses.field(default=False, metadata=RUN_MAY_CHANGE)
  """Whether the arrays of the optimizer state are kept in host memory, from which they are copied to the device for
  each update."""
  keep_zeros: bool = False
  """Whether weights of matrices that are exactly 0 stay 0, to train a pruned model (arXiv 2405.03594)."""

  def __post_init__(self) -> None:
    checks.positive(self, "learning_rate", "gradient_clip")
    checks.not_negative(self, "weight_decay")

  @property
  def moment_bytes(self) -> int:
    """Bytes of the state for each parameter, by order of magnitude: one moment in float32."""
    return 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
  """AdamW (arXiv 1711.05101)."""

  beta1: float = 0.9
  """Decay rate of the first moment."""
  beta2: float = 0.95
  """Decay rate of the second moment."""
  epsilon: float = 1e-8
  """Added to the square root of the second moment."""
  moment_dtype: MomentDtype = "float32"
  """Dtype in which the first moment is stored. The second moment and the update are float32."""

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.positive(self, "epsilon")
    checks.one_of(self, "moment_dtype", get_args(MomentDtype))
    checks.below_one(self, "beta1", "beta2")  # at 1 Adam divides by 1 - beta^step = 0

  @property
  def moment_bytes(self) -> int:
    return 4 + _BYTES[self.moment_dtype]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
  """Lion (arXiv 2302.06675): the sign of an interpolated momentum, with one moment. Its learning rate should be 3 to 10
  times lower than that of AdamW, and its weight decay higher by the same factor."""

  beta1: float = 0.9
  """Weight of the momentum in the update."""
  beta2: float = 0.99
  """Decay rate of the momentum."""
  moment_dtype: MomentDtype = "float32"
  """Dtype in which the momentum is stored. The update is float32."""

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.one_of(self, "moment_dtype", get_args(MomentDtype))
    checks.below_one(self, "beta1", "beta2")

  @property
  def moment_bytes(self) -> int:
    return _BYTES[self.moment_dtype]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
  """Muon (Jordan et al. 2024) for the matrices of layers, and Adam for embeddings, routers and norms, both with
  Nesterov momentum. Updates are scaled to the RMS of AdamW updates (arXiv 2502.16982), so the learning rate and weight
  decay of AdamW can be used."""

  beta: float = 0.95
  """Decay rate of the momentum."""
  iterations: int = 5
  """Number of Newton-Schulz iterations that orthogonalize the momentum."""
  update_rms: float = 0.2
  """RMS of an update before it is multiplied by the learning rate."""
  adam_beta1: float = 0.9
  """Decay rate of Adam's first moment."""
  adam_beta2: float = 0.95
  """Decay rate of Adam's second moment."""
  moment_dtype: MomentDtype = "float32"
  """Dtype in which the momentum and Adam's first moment are stored. Adam's second moment and the update are float32."""

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.positive(self, "iterations", "update_rms")
    checks.one_of(self, "moment_dtype", get_args(MomentDtype))
    checks.below_one(self, "beta", "adam_beta1", "adam_beta2")

  @property
  def moment_bytes(self) -> int:
    return _BYTES[self.moment_dtype]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Optimizer):
  """LoRA (arXiv 2106.09685): the change of each matrix of a layer, also of each expert, is a product of two narrow
  matrices, which AdamW trains. Other parameters do not change, except for routers. Weights are always merged. The
  gradient is clipped before it is projected, and weight decay applies to the narrow matrices and to routers."""

  rank: int = 8
  """Width of the narrow matrices."""
  alpha: float = 16.0
  """The change is multiplied by alpha / rank."""
  routers: bool = False
  """Whether AdamW also trains the weights of routers. With an upcycled model, whose experts begin as copies of a dense
  layer, the experts are then a routed mixture of low-rank changes of that layer, as in MoELoRA (arXiv 2402.12851)."""
  beta1: float = 0.9
  """Decay rate of the first moment."""
  beta2: float = 0.95
  """Decay rate of the second moment."""
  epsilon: float = 1e-8
  """Added to the square root of the second moment."""

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.positive(self, "rank", "alpha", "epsilon")
    checks.below_one(self, "beta1", "beta2")

  @property
  def moment_bytes(self) -> int:
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpIEL(Optimizer):
  """SpIEL-AG (arXiv 2401.16405): a sparse set of the weights of each matrix of a layer, also of each expert, is trained
  with AdamW. Other weights do not change. At intervals, the weights that changed least are reset and replaced by those
  with the largest accumulated gradients. Weight decay applies to the changes."""

  density: float = 0.01
  """Fraction of the weights of each matrix that is trained."""
  interval: int = 100
  """Number of steps between replacements."""
  accumulated: int = 5
  """Number of steps whose gradients are accumulated before a replacement. Before the first one, no weight changes."""
  replaced: float = 0.2
  """Fraction of the trained weights that is replaced at the peak learning rate. It decays with the learning rate."""
  beta1: float = 0.9
  """Decay rate of the first moment."""
  beta2: float = 0.95
  """Decay rate of the second moment."""
  epsilon: float = 1e-8
  """Added to the square root of the second moment."""

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.positive(self, "density", "epsilon")
    checks.between(self, "density", 0, 1)
    checks.positive(self, "interval")
    checks.between(self, "replaced", 0, 1)
    checks.between(self, "accumulated", 1, self.interval)
    checks.below_one(self, "beta1", "beta2")

  @property
  def moment_bytes(self) -> int:
    return 0
