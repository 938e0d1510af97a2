"""The checks that every configuration class uses. Each raises UserError with the value, the limit and the remedy."""

import math
import re
from collections.abc import Iterable

from moejax.config.kinds import path_of
from moejax.errors import UserError


def positive(owner: object, *names: str) -> None:
  """Raises unless every named field is above zero and finite."""
  for name in names:
    value = getattr(owner, name)
    if not value > 0:
      raise UserError(f"{_path(owner, name)}={value} must be above 0")
    _finite(owner, name)


def not_negative(owner: object, *names: str) -> None:
  """Raises if any named field is negative or infinite."""
  for name in names:
    value = getattr(owner, name)
    if not value >= 0:
      raise UserError(f"{_path(owner, name)}={value} must be 0 or above")
    _finite(owner, name)


def between(owner: object, name: str, low: float, high: float) -> None:
  """Raises unless low <= field <= high."""
  value = getattr(owner, name)
  if not low <= value <= high:
    raise UserError(f"{_path(owner, name)}={value} must lie between {low} and {high}")


def below_one(owner: object, *names: str) -> None:
  """Raises unless 0 <= field < 1 for every named field."""
  for name in names:
    value = getattr(owner, name)
    if not 0.0 <= value < 1.0:
      raise UserError(f"{_path(owner, name)}={value} must be 0 or above and below 1")


def one_of(owner: object, name: str, allowed: Iterable[str]) -> None:
  """Raises unless the field is one of `allowed`."""
  value, allowed = getattr(owner, name), tuple(allowed)
  if value not in allowed:
    raise UserError(f"{_path(owner, name)}={value!r} is not one of {', '.join(allowed)}")


def file_name(owner: object, name: str) -> None:
  """Raises if the field is not a valid name for a directory."""
  value = getattr(owner, name)
  size = len(value.encode(errors="replace"))
  if not 0 < size <= 200 or value in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", value):
    raise UserError(
      f"{_path(owner, name)}={value!r} cannot be the name of a directory; use 1 to 200 bytes without slashes, "
      "backslashes or control characters"
    )


def divides(divisor: int, divisor_name: str, value: int, value_name: str) -> None:
  """Raises unless `value` is divisible by `divisor`. The message gives the two nearest multiples."""
  if value % divisor:
    below, above = value // divisor * divisor, (value // divisor + 1) * divisor
    nearest = f"{below} or {above}" if below else f"{above}"
    raise UserError(f"{value_name}={value} is not divisible by {divisor_name}={divisor}; use {nearest}")


def _finite(owner: object, name: str) -> None:
  """Raises if the field is infinite, which JSON, and so experiment.json, cannot represent."""
  value = getattr(owner, name)
  if value == math.inf:
    raise UserError(f"{_path(owner, name)}={value} must be finite; use a large number such as 1e9")


def _path(owner: object, name: str) -> str:
  """The dotted path of a field, such as `optimizer.learning_rate` for a field of `Lion`."""
  return f"{path_of(type(owner))}.{name}"
