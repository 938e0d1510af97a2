"""Configuration survives JSON, and what is not a configuration is refused by name."""

import copy
import json

import pytest

from moejax.config import Experiment, Suite
from moejax.config.plain import from_plain, to_plain
from moejax.errors import UserError
from moejax.experiments import EXPERIMENTS


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
