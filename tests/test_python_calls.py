"""Functions of the package with wrong arguments: each is refused in one line that names the argument."""

import inspect
import math
import pathlib
from typing import Any

import numpy as np
import pytest

import moejax
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.python_calls import _fits, in_python, types_of_arguments

VALUES = [
  None, 3, -1, 0, 2.5, math.nan, math.inf, True, "", " ", "text", b"bytes", pathlib.Path("path"), object(), print, [],
  [3], ["a"], ("a",), {"a"}, {}, {3: 4}, {"a": 3}, np.zeros(2), np.int64(3), np.float32(0.5), Experiment, moejax,
]  # fmt: skip


@pytest.fixture
def good(tmp_path, monkeypatch) -> dict[str, Any]:
  """A right value for every argument that has no default."""
  monkeypatch.chdir(tmp_path)
  small, sparse, suite = map(moejax.find, ("quick_small", "quick_small_8e", "quickstart"))
  return {
    "experiment": small, "configuration": small, "dense": small, "moe": sparse, "suite": suite, "name": "quick_small",
    "directory": "a", "run": "a", "folder": "a", "file": "a", "topology": "cpu:1", "prompts": ["a"], "runs": ["a"],
    "experiments": [small, sparse], "new": "b", "keep": 6,
  }  # fmt: skip


@pytest.mark.parametrize("name", moejax.FUNCTIONS)
def test_a_value_of_another_type_is_refused_by_its_name_before_anything_is_done(name, good, tmp_path):
  function = getattr(moejax, name)
  types = types_of_arguments(name)
  needed = {argument: good[argument] for argument, parameter in inspect.signature(function).parameters.items()
            if parameter.default is inspect.Parameter.empty and argument in types}  # fmt: skip
  refused = {}
  for argument, hint in types.items():
    wrong = [value for value in (*VALUES, good["suite"], good["experiment"]) if not _fits(hint, value)]
    refused[argument] = len(wrong)
    for value in wrong:
      with pytest.raises(UserError) as error:
        function(**{**needed, argument: value})
      message = str(error.value)
      assert message.startswith(f"moejax.{name}: {argument}=") and "\n" not in message and len(message) < 300
  assert min(refused.values()) >= 10 and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", moejax.FUNCTIONS)
def test_missing_and_unknown_arguments_are_refused(name):
  function = getattr(moejax, name)
  for given, named in (((), {}), ((1,) * 12, {}), ((), {"no_such": 3})):
    with pytest.raises(UserError, match=rf"^moejax\.{name}: .*its arguments are "):
      function(*given, **named)


def test_right_values_of_each_type_are_taken():
  right = {
    str: ["text"], bool: [True], int: [3, np.int64(3)], float: [3, 0.5, np.float32(0.5)],
    str | pathlib.Path: ["a", pathlib.Path("a")], int | None: [None, 3],
  }  # fmt: skip
  assert all(_fits(hint, value) for hint, values in right.items() for value in values)


@pytest.mark.parametrize(
  ("said", "in_python_terms"),
  [
    ("d holds a run; choose another --workdir", "d holds a run; choose another directory"),
    ("resume it with --training.steps 30, or not", "resume it with training.steps=30, or not"),
    ("try --model.compute-dtype float32, or", "try model.compute_dtype float32, or"),
    ("add it, as in --model.moe.router.threshold VALUE", "add it, as in model.moe.router.threshold=VALUE"),
    ("lower --few-shot, remove the", "lower few_shot, remove the"),
    ("with --evaluation.allow-cut-prompts True", "with evaluation.allow_cut_prompts=True"),
    ("as files with --data DIR.", "as files with data=DIR."),
    ("a smaller --mesh.data with --mesh.replica in its place", "a smaller mesh.data with mesh.replica in its place"),
    ("`moejax train a.py:b --workdir DIR` runs it", "`moejax train a.py:b --workdir DIR` runs it"),
    ("-- and a--b stay", "-- and a--b stay"),
  ],
)
def test_messages_name_arguments_and_not_options(said, in_python_terms):
  assert in_python(said) == in_python_terms


def test_an_error_of_a_run_names_the_argument(tmp_path):
  small = moejax.find("quick_small")
  (tmp_path / "suite.json").write_text("{}")
  with pytest.raises(UserError, match=r"holds a comparison; choose another directory$"):
    moejax.train(small, tmp_path)
  with pytest.raises(UserError, match=r"not one of mlp.*; for a custom kind, import its file first"):
    moejax.replace(small, **{"model.feed_forward": "mine"})
  with pytest.raises(UserError, match=r"optimizer.kind cannot be replaced alone; give an object .* as optimizer"):
    moejax.replace(small, **{"optimizer.kind": "Lion"})
