"""Configuration classes that come in several kinds: optimizers, schedules and routers, and a user's own."""

import inspect
import re
from typing import Any, TypeVar

from moejax.errors import UserError

KIND = "kind"
"""Name of the class among the fields of a configuration that comes in several kinds."""

Base = TypeVar("Base", bound="OfSeveralKinds")


class OfSeveralKinds:
  """Base of such classes. A kind is a subclass. Importing its file is enough; there is no registration.

  A base may name its default kind, which is made where none is named, as `Optimizer(...)` makes `AdamW(...)`.
  On the command line and in JSON the field `kind` names the subclass, as in `--optimizer.kind Lion`. The name is that
  of the class, or the one that it gives itself: `class TopKRouter(Router, kind="top_k")`.
  """

  kind = ""
  default_kind = ""

  def __init_subclass__(cls, kind: str | None = None, default: str = "", **others: Any):
    super().__init_subclass__(**others)
    if OfSeveralKinds in cls.__bases__:
      cls.default_kind = default
    name, base = cls.__name__ if kind is None else kind, base_of(cls)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w-]*", name):
      raise UserError(f"kind={name!r} of {cls.__name__} is not a name; use letters, digits, _ and -, as in 'top_k'")
    if KIND in inspect.get_annotations(cls):
      raise UserError(f"{cls.__name__} cannot have a field {KIND}, which names the class itself; rename the field")
    built_in = {found.kind for found in all_subclasses(base) if _is_built_in(found) and found is not cls}
    if name in built_in and not _is_built_in(cls):
      raise UserError(f"{name!r} is the name of a built-in {path_of(base)}; give {cls.__name__} another kind")
    cls.kind = name

  def __new__(cls, **fields: object) -> Any:
    """An instance of the default kind, where `cls` is a base that has one.

    Raises:
      UserError: the class has fields, but is not a dataclass, which would ignore them.
    """
    if inspect.get_annotations(cls) and "__dataclass_fields__" not in cls.__dict__:
      raise UserError(
        f"{cls.__name__} has fields but is not a dataclass; write @dataclasses.dataclass(frozen=True, kw_only=True) "
        "above it"
      )
    return object.__new__(kinds(cls)[cls.default_kind] if OfSeveralKinds in cls.__bases__ and cls.default_kind else cls)


def kinds(base: type[Base]) -> dict[str, type[Base]]:
  """The kinds of `base`, by name. If two have the same name, the one that was defined last is used."""
  return {subclass.kind: subclass for subclass in all_subclasses(base)}


def all_subclasses(base: type[Any]) -> list[type[Any]]:
  """All direct and indirect subclasses of a class, in the order of their definition."""
  return [found for subclass in base.__subclasses__() for found in (subclass, *all_subclasses(subclass))]


def base_of(kind: type) -> type:
  """The base of a kind: `Optimizer` for `Lion` and for itself. Other classes are returned unchanged."""
  return next((parent for parent in kind.__mro__ if OfSeveralKinds in parent.__bases__), kind)


def path_of(kind: type) -> str:
  """How the fields of a class are named in errors: `optimizer` for `Lion`, `feed_forward` for `MLP`."""
  return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", base_of(kind).__name__).lower()


def _is_built_in(kind: type) -> bool:
  return kind.__module__.startswith("moejax.")
