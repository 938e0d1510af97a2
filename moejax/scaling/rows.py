"""Checks the numbers of a model and its training in a JSON file, of finished runs or of a claim.

Mistakes of units are the usual ones: billions, percent, or bits where a number of tokens, a fraction or nats are meant.
"""

from collections.abc import Mapping
from typing import Any

from moejax.errors import UserError
from moejax.scaling.shapes import Shape

LIMITS = {
  "active_parameters": (1e3, 1e15), "total_parameters": (1e3, 1e15), "embedding_parameters": (0.0, 1e15),
  "expansion": (1.0, 1e5), "granularity": (1.0, 1e4), "flops_per_token": (1e3, 1e18), "tokens": (1.0, 1e18),
  "loss": (1e-3, 20.0), "seconds": (1e-6, 1e12), "mfu": (1e-6, 1.0), "peak_flops": (1e6, 1e24),
}  # fmt: skip
"""Lowest and highest value of each key. A loss of 20 nats is that of a uniform distribution over 500 million tokens."""

UNITS = {"loss": " nats per token", "mfu": ", a fraction of the peak", "tokens": ""}
SHAPE = ("active_parameters", "total_parameters", "embedding_parameters", "expansion", "granularity", "flops_per_token")

TOKENS_PER_PARAMETER = (1e-4, 1e9)
FLOPS_PER_PARAMETER = (0.6, 6e3)
"""Training FLOPs per token and active parameter, which are about 6 without attention."""
MOST_TOTAL = 4.0
"""Largest total parameters of a model with expansion 1, relative to its active parameters: those of embeddings may not
count as active."""


def check_row(where: str, row: Mapping[str, Any], needed: tuple[str, ...], keys: tuple[str, ...]) -> None:
  """Checks keys and values of an object.

  Args:
    where: the object, for messages.
    row: the object.
    needed: keys that it must have.
    keys: keys that it may have.

  Raises:
    UserError: If a key is missing or unknown, or a value is not possible.
  """
  if unknown := sorted(row.keys() - {*keys}):
    raise UserError(f"{where}: unknown key {unknown[0]!r}; the keys are {', '.join(keys)}")
  if missing := [key for key in needed if key not in row]:
    raise UserError(f"{where} has no {missing[0]!r}")
  if not isinstance(row.get("name", ""), str):
    raise UserError(f"{where}: name={row['name']!r} is not text")
  for key, (low, high) in LIMITS.items():
    value = row.get(key, high)
    if not isinstance(value, int | float) or isinstance(value, bool):
      raise UserError(f"{where}: {key}={value!r} is not a number")
    if not low <= value <= high:
      raise UserError(f"{where}: {key}={value!r} must lie between {low:g} and {high:g}{UNITS.get(key, '')}")


def shape_of_row(where: str, row: Mapping[str, Any]) -> Shape:
  """The shape of the model of an object that `check_row` has checked.

  Raises:
    UserError: If its numbers contradict each other.
  """
  active, total = row["active_parameters"], row["total_parameters"]
  embedding, expansion, flops = row.get("embedding_parameters", 0), row.get("expansion", 1), row.get("flops_per_token")
  if active > total:
    raise UserError(f"{where}: active_parameters={active!r} is more than total_parameters={total!r}")
  if embedding >= active:
    raise UserError(f"{where}: embedding_parameters={embedding!r} must be less than active_parameters={active!r}")
  if total > MOST_TOTAL * expansion * active:
    raise UserError(
      f"{where}: total_parameters={total!r} is {total / active:.3g} times active_parameters, which an expansion of "
      f"{expansion!r} does not explain; give the expansion of an MoE"
    )
  if expansion > 1 and total == active:
    raise UserError(f"{where}: all parameters are active, but expansion={expansion!r} is above 1, as of an MoE")
  if flops is not None:
    _check_ratio(where, "flops_per_token", flops, active, FLOPS_PER_PARAMETER)
  if "tokens" in row:
    _check_ratio(where, "tokens", row["tokens"], active, TOKENS_PER_PARAMETER)
  return Shape(
    active=active, total=total, embedding=embedding, expansion=expansion, granularity=row.get("granularity", 1),
    flops_per_token=flops,
  )  # fmt: skip


def _check_ratio(where: str, key: str, value: float, active: float, limits: tuple[float, float]) -> None:
  low, high = limits
  if not low <= value / active <= high:
    raise UserError(
      f"{where}: {key}={value!r} is {value / active:.3g} per active parameter, which must lie between {low:g} and "
      f"{high:g}; give both as plain numbers, such as 2e10"
    )
