"""Configuration classes that come in several kinds: optimizers and schedules, and a user's own."""

from typing import Any, TypeVar

Base = TypeVar("Base", bound="OfSeveralKinds")


class OfSeveralKinds:
  """Base of such classes. A kind is a subclass, known from the moment its file is imported; nothing else registers it.

  On the command line and in JSON the field `kind` names the subclass, as in `--optimizer.kind Lion`.
  """


def kinds(base: type[Base]) -> dict[str, type[Base]]:
  """The classes that are a kind of `base`, by name. Of two with one name the one that was defined last counts."""
  return {subclass.__name__: subclass for subclass in all_subclasses(base)}


def all_subclasses(base: type[Any]) -> list[type[Any]]:
  """Subclasses of a class and theirs, in the order in which they were defined."""
  return [found for subclass in base.__subclasses__() for found in (subclass, *all_subclasses(subclass))]


def base_of(kind: type) -> type:
  """What a class is a kind of: `Optimizer` of `Lion` and of itself; a class without kinds as it is."""
  return next((parent for parent in kind.__mro__ if OfSeveralKinds in parent.__bases__), kind)
