"""Finds experiments and suites by name."""

import contextlib
import difflib
import importlib.util
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType

from moejax.config.experiment import Experiment, Suite
from moejax.config.stored import read_configuration
from moejax.errors import UserError
from moejax.experiments import EXPERIMENTS


def find(name: str) -> Experiment | Suite:
  """The experiment or suite of this name.

  It is listed, a member of a listed suite, `path/to/file.py:function`, or the experiment.json or suite.json that a run
  or a comparison wrote.

  Raises:
    UserError: there is none; the message names the nearest.
  """
  if ".py:" in name:
    return _from_file(name)
  if name.endswith(".json"):
    return read_configuration(pathlib.Path(name))
  if name.endswith(".py"):
    raise UserError(f"{name} names no function; add one of that file, as in {name}:my_experiment")
  if name in EXPERIMENTS:
    return EXPERIMENTS[name]()
  members = {member.name: member for suite in _suites() for member in suite.members}
  if name in members:
    return members[name]
  for file in ("experiment.json", "suite.json"):
    if (pathlib.Path(name) / file).is_file():
      raise UserError(f"{name} is a directory; to start from its configuration, name {pathlib.Path(name) / file}")
  near = difflib.get_close_matches(name, dict.fromkeys([*EXPERIMENTS, *members]), n=3, cutoff=0.4)
  hint = f"did you mean {' or '.join(near)}?" if near else "`moejax list` shows all"
  raise UserError(f"no experiment is named {name!r}; {hint}")


def find_experiment(name: str) -> Experiment:
  """As `find`; raises UserError for a suite."""
  found = find(name)
  if isinstance(found, Suite):
    members = ", ".join(member.name for member in found.members)
    raise UserError(f"{name!r} is a suite: `moejax compare {name}` runs it whole; its members are {members}")
  return found


def find_suite(name: str) -> Suite:
  """As `find`; raises UserError for a single experiment."""
  found = find(name)
  if isinstance(found, Experiment):
    suites = ", ".join(suite.name for suite in _suites())
    raise UserError(f"{name!r} is one experiment: `moejax train {name}` runs it; suites are {suites}")
  return found


def listed() -> list[tuple[str, Experiment | Suite, str]]:
  """Name, value and first docstring line of all listed experiments and suites, followed by other members of suites."""
  rows = [(name, make(), _summary(make)) for name, make in EXPERIMENTS.items()]
  for suite in _suites():
    rows += [
      (member.name, member, f"member of {suite.name}") for member in suite.members if member.name not in EXPERIMENTS
    ]
  return rows


def _suites() -> list[Suite]:
  made = [make() for make in EXPERIMENTS.values()]
  return [value for value in made if isinstance(value, Suite)]


def _from_file(name: str) -> Experiment | Suite:
  path, _, function = name.rpartition(":")
  if not pathlib.Path(path).is_file():
    raise UserError(f"{path} does not exist; name a file and a function in it, as in path/to/mine.py:my_experiment")
  with _neighbors_importable(path), _one_line_errors(path):
    made = _function(path, function)()
  if not isinstance(made, Experiment | Suite):
    raise UserError(f"{name} returned {type(made).__name__}; it must return an Experiment or a Suite")
  return made


def import_file(path: str) -> ModuleType:
  """Executes a file of the user's, whose routers, optimizers and other kinds of configuration are then known by name.

  Raises:
    UserError: there is no such file, or it raises an exception.
  """
  if not pathlib.Path(path).is_file():
    raise UserError(f"{path} does not exist; name a Python file that defines kinds of your own, as in mine.py")
  with _neighbors_importable(path), _one_line_errors(path):
    return _module(path)


def _module(path: str) -> ModuleType:
  """A file that is executed as a module. Its name is its path, which no other module has."""
  name = str(pathlib.Path(path).resolve())
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None or spec.loader is None:
    raise UserError(f"{path} is not a Python file; its name must end in .py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module  # where dataclasses look annotations up
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[name]
    raise
  return module


def _function(path: str, name: str) -> Callable[[], object]:
  """A function of a file that is executed."""
  module = _module(path)
  # Its own functions, and not those that it imports.
  functions = [
    key
    for key, value in vars(module).items()
    if callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
  ]
  found = getattr(module, name, None)
  if not callable(found):
    near = difflib.get_close_matches(name, functions, n=3, cutoff=0.4) or functions
    raise UserError(f"{path} has no function {name!r}; it has {', '.join(near) or 'none'}")
  return found


@contextlib.contextmanager
def _neighbors_importable(path: str) -> Iterator[None]:
  """Lets a file import the modules in its folder, as Python does for a script."""
  folder = str(pathlib.Path(path).parent.resolve())
  sys.path.insert(0, folder)
  try:
    yield
  finally:
    sys.path.remove(folder)


@contextlib.contextmanager
def _one_line_errors(path: str) -> Iterator[None]:
  """Makes any exception of a user's file a UserError with the line where that file, or one beside it, raised it."""
  try:
    yield
  except (Exception, SystemExit) as error:
    text = " ".join(str(error).split())
    where = _user_line(path, error)
    if isinstance(error, UserError):
      raise UserError(f"{where}: {text}" if where else text) from error
    kind = type(error).__name__
    raise UserError(f"{where or path}: {kind}: {text}" if text else f"{where or path}: {kind}") from error


def _user_line(path: str, error: BaseException) -> str | None:
  """FILE:LINE of the innermost code of the user's folder in a traceback; None where it was not reached."""
  folder, ours = pathlib.Path(path).parent.resolve(), pathlib.Path(__file__).parent
  lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
  if isinstance(error, SyntaxError) and error.filename:
    lines.append((error.filename, error.lineno or 1))
  for name, line in reversed(lines):
    file = pathlib.Path(name).resolve()
    if file.is_relative_to(folder) and not file.is_relative_to(ours) and file.is_file():
      return f"{path if file == pathlib.Path(path).resolve() else os.path.relpath(file)}:{line}"
  return None


def _summary(make: Callable[[], Experiment | Suite]) -> str:
  return (make.__doc__ or "").strip().splitlines()[0] if make.__doc__ else ""
