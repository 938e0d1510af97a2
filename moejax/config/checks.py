"""The checks that every configuration class uses. Each raises UserError with the value, the limit and the remedy."""

import re
from collections.abc import Iterable

from moejax.config.kinds import path_of
from moejax.errors import UserError

LARGEST_INTEGER = 2**53
"""No count is larger, and a float holds every one up to it."""
LARGEST_COUNT = 2**31 - 1
"""The largest number of int32, in which programs have positions and counts."""
SMALLEST, LARGEST = 1e-30, 1e38
"""Between them, a number of float32 is neither 0 nor infinite."""
BELOW_ONE = 1 - 2**-24
"""The largest number of float32 below 1."""
SEEDS = 2**32
"""JAX takes a seed modulo this number."""


def positive(owner: object, *names: str, largest: int = LARGEST_COUNT) -> None:
  """Raises unless every named field is above zero, and a number that float32 or, if it is an integer, int32 holds. Only
  integers that no program computes with may have another `largest` value."""
  for name in names:
    value = getattr(owner, name)
    if not value > 0:
      raise UserError(f"{_path(owner, name)}={value} must be above 0")
    _in_range(owner, name, largest)


def not_negative(owner: object, *names: str, largest: int = LARGEST_COUNT) -> None:
  """Raises unless every named field is 0 or above, and a number that float32 or, if it is an integer, int32 holds."""
  for name in names:
    value = getattr(owner, name)
    if not value >= 0:
      raise UserError(f"{_path(owner, name)}={value} must be 0 or above")
    _in_range(owner, name, largest)


def seed(owner: object, name: str) -> None:
  """Raises unless the field is a seed that differs from all others."""
  value = getattr(owner, name)
  if not 0 <= value < SEEDS:
    raise UserError(f"{_path(owner, name)}={value} must be 0 or above and below 2^32, the number of seeds of JAX")


def between(owner: object, name: str, low: float, high: float) -> None:
  """Raises unless low <= field <= high."""
  value = getattr(owner, name)
  if not low <= value <= high:
    raise UserError(f"{_path(owner, name)}={value} must lie between {low} and {high}")


def below_one(owner: object, *names: str) -> None:
  """Raises unless 0 <= field < 1 for every named field, also in float32."""
  for name in names:
    value = getattr(owner, name)
    if not 0.0 <= value < 1.0:
      raise UserError(f"{_path(owner, name)}={value} must be 0 or above and below 1")
    if value > BELOW_ONE:
      raise UserError(f"{_path(owner, name)}={value} must be at most {BELOW_ONE:.8f}, so that it is below 1 in float32")


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


def _in_range(owner: object, name: str, largest: int) -> None:
  """Raises where the field is a number that would become 0, infinite or another integer where it is used."""
  value = getattr(owner, name)
  if isinstance(value, int):
    if value > largest:
      raise UserError(f"{_path(owner, name)}={value} must be at most {largest}; use a smaller value")
  elif value > LARGEST:
    raise UserError(f"{_path(owner, name)}={value} must be at most {LARGEST:g}, so that it is finite in float32")
  elif 0 < value < SMALLEST:
    raise UserError(f"{_path(owner, name)}={value} must be at least {SMALLEST:g}, so that it is not 0 in float32")


def _path(owner: object, name: str) -> str:
  """The dotted path of a field, such as `optimizer.learning_rate` for a field of `Lion`."""
  return f"{path_of(type(owner))}.{name}"
