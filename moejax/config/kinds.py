"""Configuration classes with several kinds, such as optimizers, schedules and routers. Users can add kinds."""

import contextlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from moejax.errors import Failure, UserError

KIND = "kind"
"""Name of the field that selects the kind on the command line and in JSON."""

Base = TypeVar("Base", bound="OfSeveralKinds")


class OfSeveralKinds:
  """Base class of configuration classes with several kinds. Each kind is a subclass, which needs no registration.

  A base class may have a default kind, which its constructor returns: `Optimizer(...)` returns `AdamW(...)`. On the
  command line and in JSON, the field `kind` selects the subclass, as in `--optimizer.kind Lion`. Its value is the name
  of the class or the `kind` argument of its definition, as in `class TopKRouter(Router, kind="top_k")`.
  """

  kind = ""
  default_kind = ""
  functions = ""
  """The table of the functions that implement the kinds, as `module.TABLE`. Empty if they need none."""

  def __init_subclass__(cls, kind: str | None = None, default: str = "", functions: str = "", **others: Any):
    super().__init_subclass__(**others)
    if OfSeveralKinds in cls.__bases__:
      cls.default_kind, cls.functions = default, functions
    name, base = cls.__name__ if kind is None else kind, base_of(cls)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w-]*", name):
      raise UserError(
        f"kind={name!r} of {cls.__name__} is not a valid name; use letters, digits, _ and -, as in 'top_k'"
      )
    if KIND in inspect.get_annotations(cls):
      raise UserError(f"{cls.__name__} cannot have a field named {KIND}, which selects the class; rename the field")
    built_in = {found.kind for found in all_subclasses(base) if is_built_in(found) and found is not cls}
    if name in built_in and not is_built_in(cls):
      raise UserError(f"{name!r} is the kind of a built-in {path_of(base)}; use another kind for {cls.__name__}")
    cls.kind = name

  def __new__(cls, **fields: object) -> Any:
    """Returns an instance of the default kind if `cls` is a base class with a default kind, else of `cls`.

    Raises:
      UserError: If the class has fields but is not a dataclass, so that they would be ignored.
    """
    if inspect.get_annotations(cls) and "__dataclass_fields__" not in cls.__dict__:
      raise UserError(
        f"{cls.__name__} has fields but is not a dataclass; decorate it with "
        "@dataclasses.dataclass(frozen=True, kw_only=True)"
      )
    return object.__new__(kinds(cls)[cls.default_kind] if OfSeveralKinds in cls.__bases__ and cls.default_kind else cls)


def kinds(base: type[Base]) -> dict[str, type[Base]]:
  """The kinds of `base`, by name. If two have the same name, the one that was defined last is used."""
  return {subclass.kind: subclass for subclass in all_subclasses(base)}


def all_subclasses(base: type[Any]) -> list[type[Any]]:
  """All direct and indirect subclasses of a class, in the order of their definition."""
  return [found for subclass in base.__subclasses__() for found in (subclass, *all_subclasses(subclass))]


def base_of(kind: type) -> type:
  """The base class of a kind, such as `Optimizer` for `Lion`. Other classes are returned unchanged."""
  return next((parent for parent in kind.__mro__ if OfSeveralKinds in parent.__bases__), kind)


def path_of(kind: type) -> str:
  """The path of a class in error messages, such as `optimizer` for `Lion` and `feed_forward` for `MLP`."""
  return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", base_of(kind).__name__).lower()


def is_built_in(kind: type) -> bool:
  """Whether a class is moejax's own."""
  return kind.__module__.startswith("moejax.")


def described(kind: type) -> str:
  """How errors name a class of a user: `router ReluRouter of mine.py`."""
  file = getattr(sys.modules.get(kind.__module__), "__file__", None)
  what = path_of(kind) if base_of(kind) is not kind else "class"
  return f"{what} {kind.__name__} of {short_path(file) if file else kind.__module__}"


def short_path(path: str) -> str:
  """A path, relative to the current folder if it is in there."""
  relative = os.path.relpath(path)
  return path if relative.startswith(os.pardir) else relative


RAISED_BY = "raised by "
"""How the note begins that names the kind whose code raised an exception."""


def function_of(config: OfSeveralKinds, table: Mapping[type, Any]) -> Any:
  """The function of a configuration in the table of its kinds.

  Raises:
    UserError: If the table has none.
  """
  kind = type(config)
  if kind not in table:
    raise UserError(
      f"{path_of(kind)} {kind.__name__} has no function; add one, as in {kind.functions}[{kind.__name__}]"
    )
  return table[kind]


def check_functions(parts: Iterable[object]) -> None:
  """Checks that all kinds of a user have a function, without importing JAX.

  Raises:
    UserError: If one has none.
  """
  for part in parts:
    if isinstance(part, OfSeveralKinds) and part.functions and not is_built_in(type(part)):
      module, _, table = part.functions.rpartition(".")
      # A file that adds to a table has imported its module.
      function_of(part, getattr(sys.modules.get(module), table, {}))


@contextlib.contextmanager
def running(config: OfSeveralKinds) -> Iterator[None]:
  """Adds a note to an exception of a user's own code that says which kind raised it."""
  try:
    yield
  except (UserError, Failure):
    raise
  except Exception as error:
    if not is_built_in(type(config)):
      error.add_note(f"{RAISED_BY}{described(type(config))}")
    raise
