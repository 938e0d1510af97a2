"""Integer fields: programs count in int32, and a number that it does not hold is refused before anything compiles."""

import dataclasses
import re
import types
from typing import Union, get_args, get_origin, get_type_hints

import pytest
from random_fields import DENSE, SPARSE

from moejax.config.checks import LARGEST_COUNT
from moejax.config.fields import with_fields
from moejax.config.kinds import OfSeveralKinds, base_of, kinds
from moejax.config.walk import walk
from moejax.errors import UserError

OF_THE_HOST = {"data.seed", "evaluation.max_tokens"}
"""Integers that no program computes with: they shuffle documents and count the tokens of all batches."""

SMALLER = {
  "exchange_chunks": "must lie between 1 and 64",
  "accumulated": "must lie between 1 and 100",
  "attention_experts": "makes",
}
"""Integers with a limit of their own."""


def integers(owner):
  """Names of the fields of a class that hold an integer."""
  for name, hint in get_type_hints(owner).items():
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if int in options and name in {field.name for field in dataclasses.fields(owner)}:
      yield name


def alike(kind, part):
  """An instance of a kind with the fields that it shares with another, and 1 in others without a default."""
  shared = {field.name for field in dataclasses.fields(kind)} & {field.name for field in dataclasses.fields(part)}
  needed = {field.name: 1 for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
  return kind(**needed | {name: getattr(part, name) for name in shared})


def fields():
  """Every integer field of every kind, with a configuration that has it."""
  found = {}
  for experiment in (DENSE, SPARSE):
    for path, part in walk(experiment):
      if dataclasses.is_dataclass(part):
        several = isinstance(part, OfSeveralKinds)
        for kind in kinds(base_of(type(part))).values() if several else [type(part)]:
          if kind.__module__.startswith("moejax."):
            owner = part if kind is type(part) else alike(kind, part)
            found |= {(f"{path}.{name}".lstrip("."), kind.__name__): (owner, name) for name in integers(kind)}
  return {f"{path}-{kind}": value for (path, kind), value in found.items() if path not in OF_THE_HOST}


FIELDS = fields()


@pytest.mark.parametrize("field", FIELDS)
def test_an_integer_beyond_int32_is_an_error_with_its_limit(field):
  owner, name = FIELDS[field]
  limit = f"must be at most {LARGEST_COUNT}; use a smaller value"
  for value in (2**32, 2**63):
    message = "must be 0 or above and below 2^32" if name == "seed" else SMALLER.get(name, limit)
    with pytest.raises(UserError, match=rf"{name}={value} .*{re.escape(message)}"):
      dataclasses.replace(owner, **{name: value})
  if name != "seed":
    with pytest.raises(UserError, match=rf"{name}={LARGEST_COUNT + 1} "):
      dataclasses.replace(owner, **{name: LARGEST_COUNT + 1})


@pytest.mark.parametrize("name", ["training", "evaluation"])
def test_a_batch_has_no_more_choices_than_int32_counts(name):
  of_tokens = {f"{name}.batch_size": 2**20, "data.sequence_length": 2**11}
  for experiment, fields in ((DENSE, of_tokens), (SPARSE, of_tokens | {"data.sequence_length": 2**10})):
    with pytest.raises(UserError, match=rf"{name}.batch_size={2**20} .* {2**31} .* at most {LARGEST_COUNT}; lower"):
      with_fields(experiment, {"matchable": (), **fields})
  with_fields(SPARSE, of_tokens | {"data.sequence_length": 2**9})


def test_integers_that_no_program_computes_with_may_be_larger():
  experiment = with_fields(DENSE, {"data.seed": 2**40, "evaluation.max_tokens": 2**40})
  assert experiment.evaluation.max_tokens == 2**40
