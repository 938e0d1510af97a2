"""Experiments and suites from the files that runs and comparisons write."""

import json
from dataclasses import replace

import pytest

from moejax.config import Mesh
from moejax.config.plain import to_plain
from moejax.config.stored import read_configuration, read_experiment_file
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
