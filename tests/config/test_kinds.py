"""Classes of several kinds: what a user's own kind may not be."""

import dataclasses
import gc

import pytest

from moejax.config import Router
from moejax.config.kinds import all_subclasses
from moejax.config.router import TopKRouter
from moejax.errors import UserError


@pytest.fixture(autouse=True)
def only_our_own_kinds():
  """The classes of a test are gone after it: kinds are found among all subclasses."""
  yield
  gc.collect()


@pytest.mark.parametrize("kind", [3, "", "a b", "a.b", "1st"])
def test_a_kind_that_is_not_a_name_is_refused(kind):
  with pytest.raises(UserError, match="is not a valid name; use letters"):
    type("Mine", (TopKRouter,), {}, kind=kind)


def test_a_field_named_kind_is_refused():
  with pytest.raises(UserError, match="Mine cannot have a field named kind, which selects the class"):
    type("Mine", (TopKRouter,), {"__annotations__": {"kind": str}, "kind": "x"})


def test_fields_without_the_decorator_are_refused():
  plain = type("Plain", (TopKRouter,), {"__annotations__": {"temperature": float}, "temperature": 2.0})
  with pytest.raises(UserError, match="Plain has fields but is not a dataclass"):
    plain()
  decorated = dataclasses.dataclass(frozen=True, kw_only=True)(plain)
  assert decorated(temperature=3.0).temperature == 3.0


def test_every_kind_of_ours_can_be_made_from_its_fields():
  for found in all_subclasses(Router):
    if found.__module__.startswith("moejax."):
      assert "__dataclass_fields__" in found.__dict__
