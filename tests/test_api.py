"""The commands as functions of the package: what they return, and that importing the package costs nothing."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import moejax
from moejax.config import Evaluation, Experiment, GroupedQuery, Lion, Suite
from moejax.errors import UserError

TINY = {
  "data.sequence_length": 32,
  "evaluation": Evaluation(batch_size=8, max_tokens=512),
  "model.num_layers": 1,
  "model.layers": "scanned",
  "training.batch_size": 8,
  "training.steps": 2,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("texts")
  for i in range(24):
    (folder / f"{i}.txt").write_text(f"Document {i} counts: " + " ".join(str(n * i) for n in range(40)))
  return folder


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
  small = moejax.find("quick_small")
  assert isinstance(small, Experiment)
  text = {"data.train": (str(texts),), "data.validation_fraction": 0.3}
  experiment = moejax.replace(small, name="small", **TINY, **text, **{"mesh.data": 1})
  return moejax.train(experiment, tmp_path_factory.mktemp("run") / "small")


def test_importing_the_package_imports_none_of_its_files_and_no_library():
  done = subprocess.run(
    [sys.executable, "-c", "import sys, moejax; print(sorted(m for m in sys.modules if m.split('.')[0] in "
     "('moejax', 'jax', 'numpy', 'rich')))"],
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert done.stdout.strip() == "['moejax']"


def test_every_function_is_found_and_what_there_is_not_is_an_attribute_error():
  for name in moejax.FUNCTIONS:
    assert callable(getattr(moejax, name)) and getattr(moejax, name).__doc__ and name in dir(moejax)
  with pytest.raises(AttributeError, match="has no attribute 'trian'"):
    moejax.trian  # type: ignore[attr-defined]  # noqa: B018


def test_a_trained_run_has_its_numbers_and_shows_them_in_a_notebook(trained):
  assert trained.steps == 2 and trained.summary["name"] == "small"
  assert (trained.directory / "summary.json").is_file()
  assert repr(trained).startswith("Trained('small', steps=2, bits_per_byte=")
  assert f"<td>{trained.bits_per_byte:,.5g}</td>" in trained._repr_html_()


def test_a_trained_run_continues_texts_greedily_and_the_same_twice(trained):
  once = moejax.generate(trained.directory, ["Document 3 ", "Document 17 counts"], max_tokens=8)
  assert once == moejax.generate(trained.directory, ["Document 3 ", "Document 17 counts"], max_tokens=8)
  assert len(once) == 2 and all(isinstance(text, str) for text in once)
  with pytest.raises(UserError, match="max_tokens=32 must lie between 1 and 31"):
    moejax.generate(trained.directory, ["a"], max_tokens=32)


def test_fields_are_replaced_together_by_their_paths_and_checked():
  small = moejax.find("quick_small")
  assert isinstance(small, Experiment)
  heads = {"model.num_heads": 4, "model.num_kv_heads": 4}  # either alone would not be valid
  assert moejax.replace(small, **heads).model.num_kv_heads == 4
  lion = {"optimizer.beta1": 0.5, "optimizer": Lion(learning_rate=0.1), "optimizer.weight_decay": 0.2}
  assert moejax.replace(small, **lion).optimizer == Lion(learning_rate=0.1, beta1=0.5, weight_decay=0.2)
  with pytest.raises(UserError, match=r"^model\.moe is None, which has no field 'd_ff'$"):
    moejax.replace(small, **{"model.moe.d_ff": 8})
  with pytest.raises(UserError, match=r"Model has no field 'num_head'; its fields are num_layers"):
    moejax.replace(small, **{"model.num_head": 4})
  with pytest.raises(UserError, match=r"batch_size is 8, which has no field 'size'|batch_size is \d+, which has no"):
    moejax.replace(small, **{"training.batch_size.size": 4})
  with pytest.raises(UserError, match="must be above 0"):
    moejax.replace(small, **{"training.batch_size": 0})


def test_a_field_of_a_layer_of_the_attention_pattern_is_replaced_by_its_index():
  base = moejax.find("quick_small")
  assert moejax.replace(base, **{"model.attention.0.window": 8}).model.attention == (GroupedQuery(window=8),)
  for path in ("model.attention.1.window", "model.attention.0", "model.attention.window"):
    with pytest.raises(UserError, match=r"does not exist; use model\.attention\.0\.FIELD"):
      moejax.replace(base, **{path: 8})


def test_a_field_of_an_experiment_is_replaced_in_every_member_of_a_suite():
  suite = moejax.find("quickstart")
  assert isinstance(suite, Suite)
  changed = moejax.replace(suite, tolerance=0.1, **{"training.steps": 7})
  assert changed.tolerance == 0.1 and {member.training.steps for member in changed.members} == {7}
  sparse = moejax.replace(suite, **{"model.moe.group_size": 32, "training.losses.router_z": 0.5})
  assert {member.model.moe.group_size for member in sparse.members if member.model.moe} == {32}
  assert [pair.dense for pair in sparse.pairs] == [pair.dense for pair in suite.pairs]


def test_a_plan_is_values_that_show_themselves(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  small = moejax.find("quick_small")
  assert isinstance(small, Experiment)
  planned = moejax.plan(moejax.replace(small, **TINY), "cpu:8")
  assert planned.fits and np.isfinite(planned.step_time_s)
  assert repr(planned).startswith("Plan('quick_small', 'cpu:8', fits=True, step_time_s=")
  assert "quick_small on cpu:8" in planned._repr_html_()


@pytest.mark.parametrize(
  ("path", "value", "said"),
  [
    ("model.num_layers", "4", "model.num_layers is '4', not int"),
    ("model.num_layers", 4.5, "model.num_layers is 4.5, not int"),
    ("model.num_layers", True, "model.num_layers is True, not int"),
    ("model", None, "model is None, not an object"),
    ("model.", 1, "Model has no field ''"),
    ("model.moe", 3, "model.moe is 3, not an object"),
    ("optimizer.learning_rate", "fast", "optimizer.learning_rate is 'fast', not float"),
    ("data.train", "books", "data.train is 'books', not a list"),
    ("model.num_layers", np.zeros(2), "model.num_layers is array([0., 0.]), not int"),
    ("model.moe", object, "model.moe is <class 'object'>, not an object"),
    ("mesh.data", -1, "mesh.data=-1 must be above 0"),
  ],
)
def test_a_value_of_another_type_is_refused(path, value, said):
  with pytest.raises(UserError, match=re.escape(said)):
    moejax.replace(moejax.find("quick_small"), **{path: value})


def test_paths_are_text():
  texts = {"data.train": [pathlib.Path("a"), "b"], "evaluation.task_data": pathlib.Path("c")}
  replaced = moejax.replace(moejax.find("quick_small"), **texts)
  assert isinstance(replaced, Experiment)
  assert (replaced.data.train, replaced.evaluation.task_data) == (("a", "b"), "c")


def test_numbers_of_numpy_are_numbers():
  fields = {"model.num_layers": np.int64(3), "optimizer.learning_rate": np.float32(0.5)}
  replaced = moejax.replace(moejax.find("quick_small"), **fields)
  assert isinstance(replaced, Experiment)
  assert (type(replaced.model.num_layers), type(replaced.optimizer.learning_rate)) == (int, float)


def test_a_sampling_that_does_not_fit_is_refused(trained):
  for seed in (-1, 2**32, 10**30):
    with pytest.raises(UserError, match=rf"seed={seed} must be 0 or above and below 2\^32"):
      moejax.generate(trained.directory, ["a"], seed=seed)
  with pytest.raises(UserError, match=r"temperature=-1\.0 must be 0, for greedy decoding, or between 1e-30 and"):
    moejax.generate(trained.directory, ["a"], temperature=-1.0)


def test_half_a_surrogate_pair_is_continued_as_the_replacement_character(trained):
  directory = trained.directory
  assert moejax.generate(directory, ["\ud800"], max_tokens=4) == moejax.generate(directory, ["\ufffd"], max_tokens=4)
