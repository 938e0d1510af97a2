"""Finds experiments and suites by name."""

import difflib
import pathlib
from collections.abc import Callable

from moejax.config.experiment import Experiment, Suite
from moejax.config.stored import read_configuration
from moejax.errors import UserError
from moejax.experiments import EXPERIMENTS
from moejax.user_files import import_file, one_line_errors


def find(name: str) -> Experiment | Suite:
  """Returns the experiment or suite with this name.

  A name is listed, a member of a listed suite, `path/to/file.py:function`, or the path of an experiment.json or
  suite.json that a run or a comparison wrote.

  Raises:
    UserError: If it does not exist. The message suggests similar names.
  """
  if ".py:" in name:
    return _from_file(name)
  if name.endswith(".json"):
    return read_configuration(pathlib.Path(name))
  if name.endswith(".py"):
    raise UserError(f"{name} does not name a function; add a function of the file, as in {name}:my_experiment")
  if name in EXPERIMENTS:
    return EXPERIMENTS[name]()
  members = {member.name: member for suite in _suites() for member in suite.members}
  if name in members:
    return members[name]
  for file in ("experiment.json", "suite.json"):
    if (pathlib.Path(name) / file).is_file():
      raise UserError(f"{name} is a directory; to use its configuration, give {pathlib.Path(name) / file}")
  near = difflib.get_close_matches(name, dict.fromkeys([*EXPERIMENTS, *members]), n=3, cutoff=0.4)
  hint = f"did you mean {' or '.join(near)}?" if near else "`moejax list` shows all"
  raise UserError(f"no experiment is named {name!r}; {hint}")


def find_experiment(name: str) -> Experiment:
  """Like `find`, but raises UserError for a suite."""
  found = find(name)
  if isinstance(found, Suite):
    members = ", ".join(member.name for member in found.members)
    raise UserError(f"{name!r} is a suite; use `moejax compare {name}`, or one of its members: {members}")
  return found


def find_suite(name: str) -> Suite:
  """Like `find`, but raises UserError for a single experiment."""
  found = find(name)
  if isinstance(found, Experiment):
    suites = ", ".join(suite.name for suite in _suites())
    raise UserError(f"{name!r} is a single experiment; use `moejax train {name}`, or one of the suites: {suites}")
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
  make = _function(path, function)
  with one_line_errors(path):
    made = make()
  if not isinstance(made, Experiment | Suite):
    raise UserError(f"{name} returned {type(made).__name__}; it must return an Experiment or a Suite")
  return made


def _function(path: str, name: str) -> Callable[[], object]:
  """A function of a user's file."""
  module = import_file(path)
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


def _summary(make: Callable[[], Experiment | Suite]) -> str:
  return (make.__doc__ or "").strip().splitlines()[0] if make.__doc__ else ""
