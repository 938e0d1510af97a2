"""All parts of a configuration by their paths."""

import dataclasses
import json

from moejax.config import Lion
from moejax.config.fields import get_field
from moejax.config.plain import to_plain
from moejax.config.walk import join, leaves, walk


def test_the_parts_of_an_experiment_are_what_json_holds_of_it(tiny_moe):
  def flat(plain, path=""):
    if isinstance(plain, dict):
      return {found: value for name, part in plain.items() for found, value in flat(part, join(path, name)).items()}
    if isinstance(plain, list) and plain and isinstance(plain[0], dict):
      return flat({str(i): item for i, item in enumerate(plain)}, path)
    return {path: plain}

  found = json.loads(json.dumps({path: value for path, value in leaves(tiny_moe) if not path.startswith("rules.")}))
  plain = json.loads(json.dumps(to_plain(tiny_moe)))
  assert {f"rules.{name}": tuple(axes) for name, axes in plain.pop("rules")} == {
    path: value for path, value in leaves(tiny_moe) if path.startswith("rules.")
  }
  assert found == flat(plain)


def test_a_path_leads_to_its_value_and_each_part_comes_before_what_is_inside(tiny_moe):
  paths = dict(walk(tiny_moe))
  for path, value in paths.items():
    if path and not path.startswith("rules."):
      assert get_field(tiny_moe, path) == value
  order = list(paths)
  assert all(order.index(path.rpartition(".")[0]) < i for i, path in enumerate(order) if path)


def test_members_are_named_by_index_and_kinds_by_their_name(tiny_suite, tiny_dense):
  paths = dict(walk(tiny_suite))
  assert paths["pairs.0.dense"] == tiny_suite.pairs[0].dense
  assert paths["pairs.0.candidates.0.model.moe.d_ff"] == tiny_suite.pairs[0].candidates[0].model.moe.d_ff
  lion = dataclasses.replace(tiny_dense, optimizer=Lion(learning_rate=1e-3))
  assert dict(leaves(lion, "here"))["here.optimizer.kind"] == "Lion"
