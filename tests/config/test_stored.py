"""Experiments and suites from the files that runs and comparisons write."""

import json
from dataclasses import replace

import pytest

from moejax.config import DenseRouter, ExpertChoiceRouter, GroupedDispatch, Mesh, TopKRouter, TopPRouter
from moejax.config.plain import to_plain
from moejax.config.stored import current, read_configuration, read_experiment_file
from moejax.errors import UserError


def write(path, steps, experiment, **more):
  path.write_text(json.dumps({"steps": steps, **to_plain(experiment), **more}))
  return path


def test_a_run_is_as_long_as_it_was_and_its_data_axis_is_open(tiny_moe, tmp_path):
  there = replace(tiny_moe, mesh=Mesh(data=8))
  path = write(tmp_path / "experiment.json", 100, there, earlier_schedules=[{"steps": 50, "last_step": 50}])
  assert read_experiment_file(path) == tiny_moe
  assert read_configuration(path) == replace(tiny_moe, training=replace(tiny_moe.training, steps=100))


def test_a_suite_comes_back_too(tiny_suite, tmp_path):
  (tmp_path / "suite.json").write_text(json.dumps(to_plain(tiny_suite)))
  assert read_configuration(tmp_path / "suite.json") == tiny_suite


@pytest.mark.parametrize(
  ("router", "now"),
  [
    ({}, TopKRouter()),
    ({"bias_rate": 0.5, "expert_groups": 2}, TopKRouter(bias_rate=0.5, expert_groups=2)),
    ({"kind": "top_p", "threshold": 0.5, "gumbel": 0.1}, TopPRouter(threshold=0.5, gumbel=0.1)),
    ({"kind": "expert_choice", "renormalize": False, "scores": "sigmoid"}, ExpertChoiceRouter(scores="sigmoid")),
    ({"kind": "dense", "renormalize": False, "scale": 2.0}, DenseRouter(scale=2.0)),
  ],
)
def test_a_file_that_lists_the_fields_of_all_routers_and_dispatches_is_read(router, now, tiny_moe, tmp_path):
  """As every router was written while all had the same fields."""
  path = write(tmp_path / "experiment.json", 100, tiny_moe)
  content = json.loads(path.read_text())
  content["training"]["losses"]["load_balance"] = 0.0
  moe = content["model"]["moe"]
  moe["router"] = {
    "kind": "top_k", "scores": "softmax", "renormalize": True, "scale": 1.0, "threshold": None, "bias_rate": 0.0,
    "expert_groups": 1, "groups_per_token": 1, "jitter": 0.0, "gumbel": 0.0,
  } | router  # fmt: skip
  moe |= {"dispatch": "grouped", "exchange": "all_gather", "priority": "choice", "receive_factor": None}
  moe["group_size"] = None
  moe["experts_per_token"] = moe["num_experts"] if router.get("kind") == "dense" else 2
  path.write_text(json.dumps(content))
  found = read_experiment_file(path).model.moe
  assert (found.router, found.dispatch) == (now, GroupedDispatch(exchange="all_gather"))
  assert current(to_plain(tiny_moe)) == to_plain(tiny_moe)


def test_the_former_name_of_matchable_is_read_in_experiments_and_suites(tiny_moe, tiny_suite, tmp_path):
  experiment = replace(tiny_moe, matchable=("model.num_layers",))
  suite = replace(tiny_suite, pairs=(replace(tiny_suite.pairs[0], candidates=(experiment,)),))
  for content in (experiment, suite):
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(to_plain(content)).replace('"matchable"', '"free"'))
    assert read_configuration(path) == content


def test_a_field_of_another_router_that_is_set_is_refused(tiny_moe, tmp_path):
  path = write(tmp_path / "experiment.json", 100, tiny_moe)
  content = json.loads(path.read_text())
  content["model"]["moe"]["router"]["threshold"] = 0.5
  path.write_text(json.dumps(content))
  with pytest.raises(UserError, match=r"model\.moe\.router\.threshold is not a field of TopKRouter"):
    read_experiment_file(path)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (None, r"experiment\.json cannot be read: No such file or directory; give the experiment\.json of a run$"),
    ("{", r"experiment\.json is not JSON \(.*\); give"),
    ("[1]", r"experiment\.json is not an experiment: it contains a list; give"),
    ("{}", r"experiment\.json is not an experiment: name is missing$"),
    ('{"pairs": []}', r"experiment\.json is not a suite: name is missing$"),
    ('{"name": "x", "modle": 1}', r"experiment\.json is not an experiment: modle is not a field of Experiment"),
  ],
)
def test_what_is_no_configuration_is_refused_in_one_line(tmp_path, text, message):
  if text is not None:
    (tmp_path / "experiment.json").write_text(text)
  with pytest.raises(UserError, match=message) as error:
    read_configuration(tmp_path / "experiment.json")
  assert "\n" not in str(error.value)
