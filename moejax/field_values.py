"""Parses the values of fields from the command line."""

import difflib
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from moejax.errors import UserError

NONE = ("none", "null")
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_values(texts: Sequence[str], kind: Any, path: str, now: Any) -> Any:
  """Parses the arguments of the option of field `path`, which has type `kind` and currently the value `now`.

  Raises:
    UserError: If there are too few or too many arguments, or one has the wrong type.
  """
  if typing.get_origin(kind) is tuple:
    element = typing.get_args(kind)[0]
    return tuple(_parse(text, element, path, now[0] if now else None) for text in texts)
  if not texts:
    raise UserError(f"{option(path)} needs a value: {_described(kind)}, {_example(kind, path, now)}")
  if len(texts) > 1:
    raise UserError(f"{option(path)} takes one value but got {len(texts)}: {' '.join(texts)}; give one")
  return _parse(texts[0], kind, path, now)


def option(path: str) -> str:
  """The command-line option of a field, such as `--model.num-layers`."""
  return f"--{path.replace('_', '-')}"


def _parse(text: str, kind: Any, path: str, now: Any) -> Any:
  for alternative in _alternatives(kind):
    try:
      return _of_type(text, alternative, kind)
    except ValueError:
      continue
  near = [choice for choice in difflib.get_close_matches(text.lower(), _choices(kind), n=1) if choice != text]
  remedy = f"did you mean {near[0]}?" if near else f"give one {_example(kind, path, now)}"
  raise UserError(f"{path}={text!r} is not {_described(kind)}; {remedy}")


def _of_type(text: str, kind: Any, whole: Any) -> Any:
  """Parses `text` as type `kind`, a member of the union `whole`. Raises ValueError if that is not possible."""
  if kind is type(None):
    # A file may be named none, so for fields that also accept text, only None means no value.
    if text == "None" or (text.lower() in NONE and str not in _alternatives(whole)):
      return None
    raise ValueError
  if typing.get_origin(kind) is Literal:
    if text not in typing.get_args(kind):
      raise ValueError
    return text
  if kind is bool:
    if text.lower() not in TRUTH:
      raise ValueError
    return TRUTH[text.lower()]
  if kind is int:
    return _integer(text)
  if kind is float and not math.isfinite(float(text)):
    raise ValueError
  return kind(text)


def _integer(text: str) -> int:
  """Parses an integer in any notation: 1000, 1_000, 1e3, 1000.0."""
  try:
    return int(text)
  except ValueError:
    number = float(text)
    if not number.is_integer():  # also false for NaN and infinity
      raise
    return int(number)


def _alternatives(kind: Any) -> tuple[Any, ...]:
  """The members of a union type, None first, or the type itself."""
  parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
  return tuple(sorted(parts, key=lambda part: part is not type(None)))


def _choices(kind: Any) -> tuple[str, ...]:
  return tuple(c for part in _alternatives(kind) if typing.get_origin(part) is Literal for c in typing.get_args(part))


NAMES = {int: "an integer", float: "a finite number", bool: "True or False", str: "text", type(None): "None"}
EXAMPLES = {int: 8, float: 0.1, bool: True, str: "NAME"}


def _described(kind: Any) -> str:
  parts = sorted(_alternatives(kind), key=lambda part: part is type(None))
  return " or ".join(NAMES.get(part) or f"one of {', '.join(_choices(part))}" for part in parts)


def _example(kind: Any, path: str, now: Any) -> str:
  part = _alternatives(kind)[-1]
  return f"as in {option(path)} {now if now is not None else EXAMPLES.get(part, (_choices(part) or ('VALUE',))[0])}"
