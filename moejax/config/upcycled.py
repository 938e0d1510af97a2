"""Candidates of a pair that start from its trained dense model."""

import dataclasses

from moejax.config import checks
from moejax.config.model import OF_PROGRAM, Model
from moejax.config.router import TopKRouter
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycled:
  """A candidate that starts from the dense model of its pair (arXiv 2212.05055). At the start, it computes the same
  function: its experts are copies of the dense layers, or slices of copies if they are narrower. It continues with the
  text after that of its parent, and with a new optimizer state."""

  candidate: str
  """Name of the candidate."""
  parent_fraction: float = 0.5
  """Budget of the parent, the run of the dense model, as a fraction of the budget of the pair: one of the suite's
  shorter_budgets, or 1 for the whole run. Each seed has its own parent."""
  count_parent: bool = True
  """Whether the training time of the parent counts. If it does, the candidate has the rest of the budget, and otherwise
  the whole budget."""
  noise: float = 0.0
  """Standard deviation of the noise that is added to the weights of experts, relative to that of the matrix. With
  noise, the initial function is only approximately that of the parent."""

  def __post_init__(self) -> None:
    checks.not_negative(self, "noise")
    if not 0.0 < self.parent_fraction <= 1.0:
      raise UserError(
        f"upcycled {self.candidate!r}: parent_fraction={self.parent_fraction} must be above 0 and at most 1, the whole "
        "budget"
      )
    if self.count_parent and self.parent_fraction == 1.0:
      raise UserError(
        f"upcycled {self.candidate!r}: parent_fraction=1 leaves no time for the candidate; use a smaller fraction, or "
        "count_parent=False"
      )

  @property
  def own_fraction(self) -> float:
    """The fraction of the budget of the pair for which the candidate itself is trained."""
    return 1.0 - self.parent_fraction if self.count_parent else 1.0

  @property
  def start(self) -> str:
    """How the candidate starts, in words."""
    counts = "counts" if self.count_parent else "does not count"
    return f"upcycled from the dense model after {100 * self.parent_fraction:g} % of the budget, which {counts}"


def check_convertible(name: str, dense: Model, sparse: Model) -> None:
  """Checks that a dense model can be converted to a sparse one that initially computes the same function up to
  rounding, which may be to 8 bits.

  Raises:
    UserError: If it cannot.
  """
  moe = sparse.moe
  assert moe
  for field in dataclasses.fields(Model):
    there, here = getattr(dense, field.name), getattr(sparse, field.name)
    # Whether layers are scanned decides how parameters are stacked.
    may_differ = ("moe", *(field for field in OF_PROGRAM if field != "layers"))
    if there != here and field.name not in may_differ:
      raise UserError(
        f"upcycled {name!r}: model.{field.name}={here!r} must be that of the dense model, {there!r}; only its "
        f"feed-forward layers, and {', '.join(may_differ[1:])}, can differ"
      )
  if dense.feed_forward.kind != "mlp":
    raise UserError(f"upcycled {name!r}: feed_forward={dense.feed_forward.kind!r} cannot be converted; use 'mlp'")
  for field_name in ("leading_dense", "num_shared_experts", "bias"):
    if getattr(moe, field_name):
      raise UserError(
        f"upcycled {name!r}: model.moe.{field_name}={getattr(moe, field_name)!r} is not supported; set it to "
        f"{type(getattr(moe, field_name))()}"
      )
  if moe.has_capacity:
    raise UserError(
      f"upcycled {name!r}: experts with a capacity drop choices, so that the model would differ from its parent; use "
      "GroupedDispatch()"
    )
  slices = granularity(dense, sparse)
  for field_name in ("num_experts", "experts_per_token"):
    checks.divides(slices, "model.d_ff / model.moe.d_ff", getattr(moe, field_name), f"model.moe.{field_name}")
  if moe.router != (needed := TopKRouter(renormalize=True, scale=float(slices))):
    raise UserError(
      f"upcycled {name!r}: the weights of a token's experts must sum to {slices}, the slices of a dense layer; use "
      f"router=TopKRouter(renormalize=True, scale={needed.scale})"
    )


def granularity(dense: Model, sparse: Model) -> int:
  """Number of slices into which a dense layer is divided. Each slice is an expert."""
  assert sparse.moe
  checks.divides(sparse.moe.d_ff, "model.moe.d_ff", dense.d_ff, "model.d_ff of the dense model")
  return dense.d_ff // sparse.moe.d_ff
