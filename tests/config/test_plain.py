"""Configuration survives JSON, and what is not a configuration is refused by name."""

import collections.abc
import copy
import dataclasses
import enum
import json
import math
import pathlib
from typing import Any, Literal

import numpy as np
import pytest

from moejax.config import Experiment, Router, Schedule, Suite
from moejax.config.plain import from_plain, to_plain
from moejax.errors import UserError
from moejax.experiments import EXPERIMENTS
from moejax.lookup import find_experiment


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_listed_experiment_and_suite_comes_back_from_json_as_it_was(name):
  made = EXPERIMENTS[name]()
  text = json.dumps(to_plain(made))
  assert from_plain(Suite if isinstance(made, Suite) else Experiment, json.loads(text)) == made


@pytest.mark.parametrize(
  "path, value, complaint",
  [
    ("model.num_layer", 2, r"model\.num_layer is not a field of Model; its fields are num_layers"),
    ("model.num_layers", "2", r"model\.num_layers is '2', not int"),
    ("model.num_layers", True, r"model\.num_layers is True, not int"),
    ("model.layers", "rolled", r"model\.layers is 'rolled', not one of scanned, unrolled"),
    ("model.moe", 3, r"model\.moe is 3, not an object"),
    ("model.moe.num_experts", 0, r"moe\.num_experts=0 must be above 0"),
    ("rules.0", ["embed"], r"rules\.0 is \['embed'\], not a list of 2"),
    ("data.train", "a.txt", r"data\.train is 'a\.txt', not a list"),
    ("optimizer", None, r"optimizer is None, not an object"),
  ],
)
def test_what_is_no_configuration_is_refused_by_its_name(tiny_moe, path, value, complaint):
  plain = json.loads(json.dumps(to_plain(tiny_moe)))
  *groups, name = [int(part) if part.isdigit() else part for part in path.split(".")]
  group = plain
  for part in groups:
    group = group[part]
  group[name] = value
  with pytest.raises(UserError, match=complaint):
    from_plain(Experiment, plain)


def test_an_absent_field_takes_its_default_and_one_without_a_default_is_missed(tiny_moe):
  plain = json.loads(json.dumps(to_plain(tiny_moe)))
  older = copy.deepcopy(plain)
  del older["model"]["moe"]["dispatch"]["priority"]
  assert from_plain(Experiment, older) == tiny_moe
  del plain["model"]["d_model"]
  with pytest.raises(UserError, match=r"model\.d_model is missing"):
    from_plain(Experiment, plain)


class Colour(enum.Enum):
  RED = "red"


@dataclasses.dataclass(frozen=True)
class Inner:
  size: int = 1


UNSTORABLE = [
  (set, frozenset()), (frozenset, frozenset()), (object, print), (collections.abc.Callable, print), (Any, 3),
  (pathlib.Path, pathlib.Path("a")), (str, pathlib.Path("a")), (dict, {}), (dict[str, int], {}), (list[int], [1]),
  (np.ndarray, np.zeros(2)), (tuple[float, ...], np.zeros(2)), (int, np.int64(3)), (float, np.float32(3)),
  (float, math.nan), (float, math.inf), (float | None, -math.inf), (tuple[float, ...], (0.5, math.nan)),
  (complex, 1j), (bytes, b"a"), (Colour, Colour.RED), (Literal["a"], Colour.RED), (Literal["a"], np.zeros(2)),
  (type, int), (int, 2.5), (int, True), (str, None), (Inner, None), (tuple[Inner, ...], (Inner(size=math.nan),)),
]  # fmt: skip
STORABLE = [
  (int, 3), (float, 3), (float, 0.5), (bool, True), (str, "a"), (int | None, None), (Literal["a", "b"], "b"),
  (tuple[int, ...], (1, 2)), (tuple[tuple[str, float], ...], (("a", 0.5),)), (Inner, Inner(size=3)),
  (Inner | None, None), (tuple[Inner, ...], (Inner(), Inner(size=2))),
]  # fmt: skip


def with_field(hint: Any, value: Any) -> Experiment:
  """An experiment whose router has a field of this type and value."""
  field = ("extra", hint, dataclasses.field(default_factory=lambda: value))
  kind = dataclasses.make_dataclass("Extra", [field], bases=(Router,), frozen=True, kw_only=True)
  base = find_experiment("quick_small_8e")
  assert base.model.moe
  moe = dataclasses.replace(base.model.moe, router=kind())
  return dataclasses.replace(base, model=dataclasses.replace(base.model, moe=moe))


@pytest.mark.parametrize(("hint", "value"), UNSTORABLE)
def test_a_field_that_json_cannot_hold_is_refused_when_the_experiment_is_made(hint, value):
  with pytest.raises(
    UserError, match=r"model\.moe\.router\.extra.* \((router Extra|class Inner) of .*\); JSON can hold"
  ) as error:
    with_field(hint, value)
  assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(("hint", "value"), STORABLE)
def test_a_field_that_json_can_hold_comes_back_as_it_was(hint, value):
  made = with_field(hint, value)
  assert from_plain(Experiment, json.loads(json.dumps(to_plain(made), allow_nan=False))) == made


def test_a_path_among_the_sources_is_refused_when_the_experiment_is_made():
  base = find_experiment("quick_small")
  with pytest.raises(UserError, match=r"^data\.train\.0 is PosixPath\('texts'\), not str; JSON can hold"):
    dataclasses.replace(base, data=dataclasses.replace(base.data, train=(pathlib.Path("texts"),)))


@pytest.mark.parametrize(
  ("field", "value"), [("tolerance", np.float32(0.05)), ("train", np.str_("all")), ("name", None)]
)
def test_a_suite_is_checked_as_an_experiment_is(tiny_suite, field, value):
  with pytest.raises(UserError, match=rf"^{field} is .*; JSON can hold"):
    dataclasses.replace(tiny_suite, **{field: value})


def test_a_constructor_that_does_not_take_exactly_the_fields_is_refused():
  derived = [("derived", int, dataclasses.field(init=False, default=3))]
  argument = [("argument", dataclasses.InitVar[int], 3)]
  for fields, message in ((derived, "does not take 'derived'"), (argument, "takes 'argument', which is no field")):
    kind = dataclasses.make_dataclass("Other", fields, bases=(Schedule,), frozen=True, kw_only=True)
    kind.__post_init__ = lambda self, argument=3: None
    base = find_experiment("quick_small")
    with pytest.raises(UserError, match=rf"the constructor of Other {message}.*schedule Other of"):
      dataclasses.replace(base, optimizer=dataclasses.replace(base.optimizer, schedule=kind()))
