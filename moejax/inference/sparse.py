"""Inference with fewer experts than in training. Parameters stay as they are.

For a model that was trained with all experts (DS-MoE, arXiv 2404.05567, section 3.5), the router is replaced by one
that chooses fewer experts, and the dispatch by one that computes only the chosen ones. Attention experts, of which most
are needed, all stay in use. For a model with a top-k router, choices with a small weight are skipped (arXiv 2402.14800,
section 3.3).
"""

import dataclasses

from moejax.config.dispatch import GroupedDispatch
from moejax.config.model import Model
from moejax.config.moe import MoE
from moejax.config.router import Router, ThresholdRouter, TopKRouter
from moejax.errors import UserError

THRESHOLD = ThresholdRouter().threshold
"""Of Figure 5 of the paper."""

MODES = ("threshold", "top_k", "threshold_top_k", "skip")


@dataclasses.dataclass(frozen=True)
class Sparse:
  """Which experts inference uses."""

  mode: str
  """threshold: those whose probability is more than `value` / num_experts. top_k: the best `value`. threshold_top_k:
  for every token as many as threshold chooses in the mean of the batch, the best ones. skip: those of a top-k router
  whose score is at least `value` times that of the first choice."""
  value: float

  def __post_init__(self) -> None:
    if self.mode not in MODES:
      raise UserError(f"sparse mode {self.mode!r} is not one of {', '.join(MODES)}")
    if not self.value > 0:
      raise UserError(f"the value of sparse mode {self} must be above 0")
    if self.mode == "top_k" and not self.value.is_integer():
      raise UserError(f"the value of sparse mode {self} must be an integer, the number of experts")
    if self.mode == "skip" and self.value > 1:
      raise UserError(f"the value of sparse mode {self} must be at most 1, a ratio of weights")

  @property
  def folder(self) -> str:
    """Folder of a run for what was evaluated in this mode."""
    return f"sparse/{self.mode}_{self._number}"

  @property
  def _number(self) -> str:
    """The value without a zero after the point, and different for different values."""
    short = f"{self.value:g}"
    return short if float(short) == self.value else repr(self.value)

  def __str__(self) -> str:
    return f"{self.mode}:{self._number}"


def parse_sparse(text: str) -> Sparse:
  """A mode and its value, as in top_k:4. The value of the other modes may be left out.

  Raises:
    UserError: it is no such mode or value.
  """
  mode, _, value = text.partition(":")
  if not value and mode in ("threshold", "threshold_top_k"):
    return Sparse(mode, THRESHOLD)
  try:
    return Sparse(mode, float(value))
  except ValueError as error:
    if isinstance(error, UserError):
      raise
    raise UserError(
      f"sparse mode {text!r} has no number after the colon; use threshold:{THRESHOLD}, top_k:4, "
      f"threshold_top_k:{THRESHOLD} or skip:0.5"
    ) from None


def check_trained_densely(model: Model, what: str) -> MoE:
  """Returns the sparse layers of a model that was trained with all experts.

  Raises:
    UserError: it was not; the message begins with `what`.
  """
  moe = model.moe
  if moe is None or moe.router.kind != "dense":
    has = "no sparse layers" if moe is None else f"router.kind={moe.router.kind!r}"
    raise UserError(f"{what} is for models that were trained with router.kind='dense' (DS-MoE), and this one has {has}")
  return moe


def sparse_model(model: Model, sparse: Sparse) -> Model:
  """The model that computes only the experts that it chooses.

  Raises:
    UserError: the mode is not for a model with this router, or the model has fewer experts than top_k.
  """
  if sparse.mode == "skip":
    return _skipping(model, sparse)
  moe = check_trained_densely(model, f"sparse mode {sparse}")
  router: Router
  if sparse.mode == "top_k":
    if sparse.value > moe.num_experts:
      raise UserError(f"sparse mode {sparse} is more than moe.num_experts={moe.num_experts}; use at most that")
    experts, router = int(sparse.value), TopKRouter(renormalize=False, scale=moe.router.scale)
  else:
    equal = sparse.mode == "threshold_top_k"
    experts = moe.num_experts
    router = ThresholdRouter(threshold=sparse.value, equal_counts=equal, scale=moe.router.scale)
  dispatch = moe.dispatch if isinstance(moe.dispatch, GroupedDispatch) else GroupedDispatch()
  return dataclasses.replace(
    model, moe=dataclasses.replace(moe, experts_per_token=experts, router=router, dispatch=dispatch)
  )


def _skipping(model: Model, sparse: Sparse) -> Model:
  moe = model.moe
  if moe is None or not isinstance(moe.router, TopKRouter) or moe.experts_per_token == 1:
    has = (
      "no sparse layers"
      if moe is None
      else f"router.kind={moe.router.kind!r} and moe.experts_per_token={moe.experts_per_token}"
    )
    raise UserError(
      f"sparse mode {sparse} is for models with router.kind='top_k' and at least 2 experts per token, and this one has "
      f"{has}"
    )
  router = dataclasses.replace(moe.router, skip_below=sparse.value)
  return dataclasses.replace(model, moe=dataclasses.replace(moe, router=router))
