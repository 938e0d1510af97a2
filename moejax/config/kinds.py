"""Configuration classes that come in several kinds: optimizers and schedules, and a user's own."""

from typing import Any, TypeVar

Base = TypeVar("Base", bound="OfSeveralKinds")


class OfSeveralKinds:
  """Base of such classes. A kind is a subclass. Importing its file is enough; there is no registration.

  On the command line and in JSON the field `kind` names the subclass, as in `--optimizer.kind Lion`.
  """


def kinds(base: type[Base]) -> dict[str, type[Base]]:
  """The kinds of `base`, by name. If two have the same name, the one that was defined last is used."""
  return {subclass.__name__: subclass for subclass in all_subclasses(base)}


def all_subclasses(base: type[Any]) -> list[type[Any]]:
  """All direct and indirect subclasses of a class, in the order of their definition."""
  return [found for subclass in base.__subclasses__() for found in (subclass, *all_subclasses(subclass))]


def base_of(kind: type) -> type:
  """The base of a kind: `Optimizer` for `Lion` and for itself. Other classes are returned unchanged."""
  return next((parent for parent in kind.__mro__ if OfSeveralKinds in parent.__bases__), kind)
