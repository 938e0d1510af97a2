"""Variants of experiments over a search space: width, depth, experts, top-k, granularity and sparse layers."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from moejax.config.experiment import Experiment
from moejax.config.fields import with_fields
from moejax.errors import UserError

WIDTHS = (0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)
"""Default of `Space.width`."""


ROUNDING = 0.25
"""Largest relative change of the number of layers so that it is a multiple of a period."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
  """Values to combine. An empty tuple keeps the value of each experiment."""

  width: tuple[float, ...] = WIDTHS
  """Factors of d_model, the number of heads and the widths of feed-forward layers."""
  depth: tuple[float, ...] = ()
  """Factors of the number of layers."""
  experts: tuple[int, ...] = ()
  """Numbers of experts, before granularity."""
  top_k: tuple[int, ...] = ()
  """Numbers of experts per token, before granularity."""
  granularity: tuple[int, ...] = ()
  """Each expert is divided into this number of narrower ones, of which a token uses as many times more."""
  every: tuple[int, ...] = ()
  """Every n-th layer is sparse."""
  precision: tuple[str, ...] = ()
  """Types of the operands of large matrix products: bfloat16, fp8, int8."""

  def __post_init__(self) -> None:
    for name in ("width", "depth"):
      if not all(0.01 <= value <= 100 for value in getattr(self, name)):
        raise UserError(f"--{name} {_shown(getattr(self, name))}: a factor must lie between 0.01 and 100")
    for name in ("experts", "top_k", "granularity", "every"):
      if not all(1 <= value <= 2**16 for value in getattr(self, name)):
        option = name.replace("_", "-")
        raise UserError(f"--{option} {_shown(getattr(self, name))}: a value must lie between 1 and {2**16:,}")


def make_space(values: Mapping[str, Any]) -> Space:
  """The search space with these values.

  Raises:
    UserError: If a name is unknown or a value has the wrong type.
  """
  fields = {field.name: field for field in dataclasses.fields(Space)}
  kinds = {"width": (int, float), "depth": (int, float), "precision": (str,)}
  for name, given in values.items():
    if name not in fields:
      raise UserError(f"the search space has no {name!r}; it has {', '.join(fields)}")
    kind = kinds.get(name, (int,))
    if not isinstance(given, list | tuple) or not given or not all(type(value) in kind for value in given):
      wanted = "strings" if kind == (str,) else "integers" if kind == (int,) else "numbers"
      raise UserError(f"{name}={given!r} is not a list of {wanted}")
  return Space(**{name: tuple(given) for name, given in values.items()})


def variants(experiment: Experiment, space: Space) -> Iterator[tuple[str, Experiment | UserError]]:
  """Yields the name of each variant, and the variant, or why it is not valid."""
  of_experts = ("experts", "top_k", "granularity", "every") if experiment.model.moe else ()
  names = ("width", "depth", *of_experts)
  axes = [getattr(space, name) or (None,) for name in names]
  seen: set[Experiment] = set()
  for values in itertools.product(*axes):
    changes = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    shown = [f"{name.replace('_', '-')} {value:g}" for name, value in changes.items() if value != 1]
    try:
      varied = _varied(experiment, changes)
    except UserError as error:
      yield ", ".join([experiment.name, *shown]), error
      continue
    if varied not in seen:
      seen.add(varied)
      yield ", ".join([experiment.name, *shown]), varied


def _varied(experiment: Experiment, changes: dict[str, Any]) -> Experiment:
  model, moe = experiment.model, experiment.model.moe
  width, depth = changes.get("width", 1.0), changes.get("depth", 1.0)
  # The batch of the evaluation has no effect on a training step, and must be divisible by the mesh.
  fields: dict[str, Any] = {"evaluation.batch_size": experiment.training.batch_size}
  if width != 1.0:
    of_model = experiment.mesh.model
    groups = model.num_heads // model.num_kv_heads
    kv_heads = _multiple(width * model.num_kv_heads, of_model if model.num_kv_heads % of_model == 0 else 1)
    heads = kv_heads * groups
    d_model = heads * model.d_model / model.num_heads
    fields |= {
      "model.num_heads": heads,
      "model.num_kv_heads": kv_heads,
      "model.d_model": round(d_model) if d_model == round(d_model) else _multiple(width * model.d_model, 64),
      "model.d_ff": _multiple(width * model.d_ff, _tile(model.d_ff)),
    }
    if moe:
      fields["model.moe.d_ff"] = _multiple(width * moe.d_ff, _tile(moe.d_ff))
  every = changes.get("every", moe.every if moe else 1)
  if depth != 1.0 or "every" in changes:
    leading, period = model.leading_layers, math.lcm(every, len(model.attention))
    wanted = depth * model.num_layers
    fields["model.num_layers"] = layers = leading + _multiple(wanted - leading, period)
    if abs(layers / wanted - 1) > ROUNDING:
      raise UserError(
        f"{wanted:g} layers cannot be a multiple of a period of {period}: the nearest is {layers}; use another --every "
        "or --depth"
      )
  if moe:
    parts = changes.get("granularity", 1)
    expert = fields.get("model.moe.d_ff", moe.d_ff)
    if expert % parts:
      raise UserError(f"--granularity {parts} does not divide the width {expert} of an expert")
    fields |= {
      "model.moe.num_experts": parts * changes.get("experts", moe.num_experts),
      "model.moe.experts_per_token": parts * changes.get("top_k", moe.experts_per_token),
      "model.moe.d_ff": expert // parts,
      "model.moe.every": every,
    }
    fields |= _mesh(experiment, fields["model.moe.num_experts"])
  return with_fields(experiment, fields)


def _mesh(experiment: Experiment, num_experts: int) -> dict[str, Any]:
  """Changes of the mesh if its expert axis does not divide the number of experts: its devices join the data axis."""
  mesh = experiment.mesh
  expert = math.gcd(num_experts, mesh.expert)
  if expert == mesh.expert:
    return {}
  data = None if mesh.data is None else mesh.data * mesh.expert // expert
  return {"mesh.expert": expert, "mesh.data": data}


def _multiple(value: float, of: int) -> int:
  return max(of, round(value / of) * of)


def _tile(width: int) -> int:
  """Widths are multiples of 128, which fill the tiles of matrix units, or of an eighth of a small width."""
  return 128 if width >= 512 else max(1, width // 8)


def _shown(values: tuple[Any, ...]) -> str:
  return " ".join(map(str, values))
