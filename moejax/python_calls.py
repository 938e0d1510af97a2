"""The functions of the package: those of `moejax.api` and `moejax.api_planning`, with checks of argument types and
messages for Python.

`moejax.command_line` parses the text of a command line. In Python, arguments can be any object.
"""

import functools
import inspect
import math
import numbers
import pathlib
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moejax import api, api_planning
from moejax.config.experiment import Experiment, Suite
from moejax.errors import UserError
from moejax.progress import Progress

KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
  str: (lambda value: isinstance(value, str), "text, such as 'cpu:8'"),
  bool: (lambda value: isinstance(value, bool), "True or False"),
  int: (lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool), "an integer, such as 8"),
  float: (
    lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value),
    "a finite number, such as 0.5",
  ),
  pathlib.Path: (
    lambda value: isinstance(value, str | pathlib.Path) and bool(str(value).strip()),
    "a path, as text or a pathlib.Path, such as 'runs/mine'",
  ),
  Experiment: (lambda value: isinstance(value, Experiment), "an Experiment, as moejax.find('quick_small') returns it"),
  Suite: (lambda value: isinstance(value, Suite), "a Suite, as moejax.find('quickstart') returns it"),
  Progress: (lambda value: isinstance(value, Progress), "a moejax.progress.Progress, such as moejax.progress.SILENT"),
  Sequence: (
    lambda value: isinstance(value, list | tuple) and all(isinstance(item, str) for item in value),
    "a list of strings, such as ['a']",
  ),
  Sequence[int]: (
    lambda value: isinstance(value, list | tuple) and all(_fits(int, item) for item in value),
    "a list of integers, such as [1, 16]",
  ),
  Sequence[Experiment]: (
    lambda value: isinstance(value, list | tuple) and all(isinstance(item, Experiment) for item in value),
    "a list of experiments, such as [moejax.find('quick_small')]",
  ),
  Mapping: (
    lambda value: isinstance(value, Mapping) and all(isinstance(item, str) for item in value),
    "a dictionary by dotted paths, such as {'training.steps': 8}",
  ),
  type(None): (lambda value: value is None, "None"),
}
"""The check and the description of each argument type."""

ARGUMENTS = {"workdir": "directory", "out": "file"}
"""Arguments whose names differ from those of the command-line options."""


@functools.cache
def function(name: str) -> Callable[..., Any]:
  """Returns a function of `moejax.api` for calls from Python.

  If an argument has the wrong type, is missing or is unknown, it raises UserError before anything is done.
  """
  of_api = _of_api(name)
  signature, checked = inspect.signature(of_api), types_of_arguments(name)

  @functools.wraps(of_api)
  def call(*given: Any, **named: Any) -> Any:
    try:
      bound = signature.bind(*given, **named)
    except TypeError as error:
      raise UserError(f"moejax.{name}: {error}; its arguments are {', '.join(signature.parameters)}") from None
    for argument in checked.keys() & bound.arguments.keys():
      _check(f"moejax.{name}: {argument}", bound.arguments[argument], checked[argument])
    try:
      return of_api(*bound.args, **bound.kwargs)
    except UserError as error:
      raise UserError(in_python(str(error))) from error.__cause__

  return call


def types_of_arguments(name: str) -> dict[str, Any]:
  """The types of the arguments of a function of `moejax.api`, without `**fields`."""
  of_api = _of_api(name)
  hints, parameters = typing.get_type_hints(of_api), inspect.signature(of_api).parameters.values()
  return {each.name: hints[each.name] for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD}


def _of_api(name: str) -> Callable[..., Any]:
  return getattr(api, name, None) or getattr(api_planning, name)


def in_python(message: str) -> str:
  """Converts command-line options in a message to Python, as in `training.steps=8` for `--training.steps 8`. Commands
  in backquotes are not changed."""
  parts = message.split("`")
  return "`".join(part if i % 2 else _without_options(part) for i, part in enumerate(parts))


def _without_options(text: str) -> str:
  def argument(match: re.Match[str]) -> str:
    name, value = match[1].replace("-", "_"), match[2]
    return ARGUMENTS.get(name, name) + (f"={value}" if value else "")

  # A value is a number, a placeholder such as FILE, or a capitalized name. Other words are part of the sentence.
  return re.sub(r"(?<![\w-])--([a-z][\w-]*(?:\.[\w-]+)*)(?: ([A-Z0-9][\w./*-]*[\w/*]|[A-Z0-9]))?", argument, text)


def _check(argument: str, value: Any, hint: Any) -> None:
  if not _fits(hint, value):
    options = _options(hint)
    wanted = " or ".join(KINDS[option][1] for option in options)
    if isinstance(value, str) and {Experiment, Suite} & {*options} and value:
      wanted += f"; moejax.find({value!r}) looks it up"
    raise UserError(f"{argument}={' '.join(repr(value).split())[:60]} is not {wanted}")


def _fits(hint: Any, value: Any) -> bool:
  return any(KINDS[option][0](value) for option in _options(hint))


def _options(hint: Any) -> list[Any]:
  """The keys of KINDS for the type of an argument."""
  if isinstance(hint, typing.TypeVar):
    return [*hint.__constraints__]
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    parts = typing.get_args(hint)
    # A path is checked as a whole.
    return [key for part in parts if not (part is str and pathlib.Path in parts) for key in _options(part)]
  return [hint if hint in KINDS else typing.get_origin(hint) or hint]
