"""Converts configurations to plain data for JSON, and back."""

import dataclasses
import functools
import inspect
import json
import math
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from moejax.config.kinds import KIND, OfSeveralKinds, described, is_built_in, kinds
from moejax.config.walk import join
from moejax.errors import UserError

Configuration = TypeVar("Configuration")


IF_YOUR_OWN = "for a custom kind, import its file first, in a command with `--import FILE.py`"
"""The remedy if a kind is unknown."""

SCALARS = (bool, int, float, str, types.NoneType)
STORABLE = "JSON can hold bool, int, finite float, str, None, Literal, tuples of these, and dataclasses of these"


def check_storable(configuration: Any, path: str = "") -> None:
  """Checks that JSON can hold every field of a configuration, and that reading it returns the same configuration.

  Raises:
    UserError: If a value or the type of a field cannot be stored, or the constructor does not take exactly the fields.
  """
  kind: Any = type(configuration)
  try:
    hints = _checked_hints(kind)
    for name, hint in hints.items():
      value = getattr(configuration, name)
      back = typed(hint, value, join(path, name))
      if back != value:
        raise UserError(f"{join(path, name)} is {_short(value)}, which would come back from JSON as {_short(back)}")
  except UserError as error:
    where = "" if is_built_in(kind) else f" ({described(kind)})"
    raise UserError(f"{error}{where}; {STORABLE}") from error
  for name in hints:
    value = getattr(configuration, name)
    for i, item in enumerate(value if isinstance(value, tuple) else (value,)):
      if dataclasses.is_dataclass(item):
        check_storable(item, join(path, f"{name}.{i}" if isinstance(value, tuple) else name))


@functools.cache
def _checked_hints(kind: Any) -> dict[str, Any]:
  """The types of the fields of a class; raises UserError if its constructor does not take exactly these."""
  try:
    hints = typing.get_type_hints(kind)
  except NameError as error:
    raise UserError(
      f"the types of {kind.__name__} are not known: {error}; import them outside TYPE_CHECKING"
    ) from error
  names = [field.name for field in dataclasses.fields(kind)]
  taken = [*inspect.signature(kind.__init__).parameters][1:]
  for name in {*names} ^ {*taken}:
    raise UserError(
      f"the constructor of {kind.__name__} {'does not take' if name in names else 'takes'} {name!r}, which is "
      f"{'a' if name in names else 'no'} field; use a plain field, or a property for what follows from other fields"
    )
  return {name: hints[name] for name in names}


def to_plain(value: Any) -> Any:
  """Converts a configuration to dictionaries, lists and scalars. The field `kind` stores the kind of a class."""
  if dataclasses.is_dataclass(value):
    fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {KIND: value.kind, **fields} if isinstance(value, OfSeveralKinds) else fields
  return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_plain(kind: type[Configuration], value: Any, path: str = "") -> Configuration:
  """Creates and checks a configuration of class `kind` from plain data.

  Missing fields have their default values, so that files of earlier versions can be read.

  Raises:
    UserError: If a field is unknown, a field without a default is missing, or a value is not valid. The message names
      the field.
  """
  if not isinstance(value, dict):
    raise UserError(f"{path or kind.__name__} is {value!r}, not an object")
  if issubclass(kind, OfSeveralKinds):
    kind, value = _named(kind, value, path)
  fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
  unknown = [name for name in value if name not in fields]
  if unknown:
    raise UserError(f"{join(path, unknown[0])} is not a field of {kind.__name__}; its fields are {', '.join(fields)}")
  absent = [name for name, field in fields.items() if name not in value and _has_no_default(field)]
  if absent:
    raise UserError(f"{join(path, absent[0])} is missing")
  hints = typing.get_type_hints(kind)
  return kind(**{name: typed(hints[name], item, join(path, name)) for name, item in value.items()})


def _named(base: type[OfSeveralKinds], value: dict[str, Any], path: str) -> tuple[type, dict[str, Any]]:
  """The class that `kind` names, and the other fields."""
  known: dict[str, type] = kinds(base)
  name = value.get(KIND, base.default_kind)
  if name not in known:
    raise UserError(f"{join(path, KIND)} is {name!r}, not one of {', '.join(known)}; {IF_YOUR_OWN}")
  return known[name], {key: item for key, item in value.items() if key != KIND}


def typed(kind: Any, value: Any, path: str) -> Any:
  """Converts plain data, or a configuration, to the value of the field `path` of type `kind`.

  Raises:
    UserError: If it has another type.
  """
  origin, parts = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    return _one_of(parts, value, path)
  if origin is Literal:
    return _checked(
      type(value) in map(type, parts) and value in parts, value, path, f"one of {', '.join(map(str, parts))}"
    )
  if origin is tuple:
    _checked(isinstance(value, list | tuple), value, path, "a list")
    each = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
    _checked(len(each) == len(value), value, path, f"a list of {len(each)}")
    return tuple(typed(part, item, join(path, str(i))) for i, (part, item) in enumerate(zip(each, value, strict=True)))
  if dataclasses.is_dataclass(kind):
    if isinstance(value, typing.cast(type, kind)):
      return value
    if isinstance(value, str) and issubclass(typing.cast(type, kind), OfSeveralKinds):
      value = {KIND: value}  # with its defaults
    return from_plain(typing.cast(type, kind), value, path)
  if kind not in SCALARS:
    raise UserError(f"{path} has the type {getattr(kind, '__name__', kind)}, which JSON cannot hold")
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    _checked(abs(value) <= sys.float_info.max, value, path, "a finite number")
    return float(value)
  if kind is float and isinstance(value, float):
    _checked(math.isfinite(value), value, path, "a finite number")
  return _checked(type(value) is kind, value, path, getattr(kind, "__name__", str(kind)))


def _one_of(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
  """Converts to the first of these types that fits or, of several dataclasses, to the one with exactly these fields."""
  if value is None and type(None) in kinds:
    return None
  kinds = tuple(kind for kind in kinds if kind is not type(None))
  named = [kind for kind in kinds if dataclasses.is_dataclass(kind) and isinstance(value, dict)]
  same = [kind for kind in named if {field.name for field in dataclasses.fields(kind)} == set(value)]
  complaints = []
  for kind in same or kinds:
    try:
      return typed(kind, value, path)
    except UserError as error:
      complaints.append(error)
  raise complaints[-1]


def _checked(fits: bool, value: Any, path: str, wanted: str) -> Any:
  if not fits:
    raise UserError(f"{path} is {_short(value)}, not {wanted}")
  return value


def _short(value: Any) -> str:
  """A value in one line of at most 60 characters."""
  return " ".join(repr(value).split())[:60]


def _has_no_default(field: dataclasses.Field) -> bool:
  return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


MAX_DEPTH = 50
"""Maximum number of nested lists and dictionaries."""


def finite_float(text: str) -> float:
  """A number in JSON. Raises ValueError if it is NaN or infinite."""
  value = float(text)
  if not math.isfinite(value):
    raise ValueError(f"{text[:20]} is not a finite number")
  return value


def parse_json(text: bytes | str, number: Callable[[str], float] = finite_float) -> Any:
  """Parses JSON. `number` converts numbers with a fraction or an exponent, NaN and infinity.

  Raises:
    ValueError: If it is not JSON, has a number that `number` refuses, or is nested too deeply for recursive functions.
  """
  try:
    content = json.loads(text, parse_float=number, parse_constant=number)
    _check_depth(content, MAX_DEPTH)
  except RecursionError:
    raise ValueError("it is nested too deeply") from None
  return content


def _check_depth(content: Any, levels: int) -> None:
  """Raises RecursionError if lists and dictionaries are nested in more than this number of levels."""
  if isinstance(content, dict | list):
    if not levels:
      raise RecursionError
    for value in content.values() if isinstance(content, dict) else content:
      _check_depth(value, levels - 1)
