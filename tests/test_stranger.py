"""A run or a configuration from a stranger: nothing in it is executed, and its names lead nowhere else."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from moejax.config.plain import to_plain
from moejax.config.stored import read_configuration, read_experiment_file
from moejax.data.tokenizers import make_tokenizer
from moejax.errors import UserError
from moejax.evaluation.held_out import HeldOut

EVIL = "import pathlib\npathlib.Path('executed').touch()\n"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """The current folder, with a module whose import leaves a file."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", ["", *sys.path])
  (tmp_path / "evil_tasks.py").write_text(EVIL)
  yield tmp_path
  sys.modules.pop("evil_tasks", None)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["tokenizer", "train", "validation"])
@pytest.mark.parametrize("in_suite", [False, True])
def test_a_module_that_only_a_file_names_is_not_imported(elsewhere, tiny_dense, tiny_suite, field, in_suite):
  seqio = pytest.importorskip("seqio")
  from moejax.data.seqio_lookup import find

  name = "seqio:evil_tasks/task"
  plain = to_plain(tiny_suite if in_suite else tiny_dense)
  members = [member for pair in plain["pairs"] for member in (pair["dense"], *pair["candidates"])] if in_suite else []
  for member in members or [plain]:
    member["data"][field] = name if field == "tokenizer" else [name]
  path = elsewhere / "given.json"
  path.write_text(json.dumps(plain))
  read_configuration(path)
  refusal = r"'seqio:evil_tasks/task' is named by .*given\.json, and importing evil_tasks would execute its"
  with pytest.raises(UserError, match=refusal):
    make_tokenizer(name) if field == "tokenizer" else find(name)
  assert not (elsewhere / "executed").exists()
  # Imported by the user, it is used.
  __import__("evil_tasks")
  assert (elsewhere / "executed").exists()
  with pytest.raises(UserError, match=r"no seqio task or mixture 'task' is registered"):
    find(name)
  assert seqio


@pytest.mark.parametrize(
  "name", ["../../../outside", "..", ".", "", "/tmp/outside", "a/b", "a\\b", "a\0b", "a\nb", "x" * 201]
)
def test_a_name_is_no_path(tmp_path, tiny_dense, name):
  with pytest.raises(UserError, match=r"experiment\.name=.* cannot be the name of a directory"):
    dataclasses.replace(tiny_dense, name=name)
  path = tmp_path / "experiment.json"
  path.write_text(json.dumps(to_plain(tiny_dense) | {"name": name}))
  with pytest.raises(UserError, match="cannot be the name of a directory"):
    read_experiment_file(path)


@pytest.mark.parametrize("name", ["dense", "größer", "a=1,b (2)", "v1.0", "...", "x" * 200])
def test_other_names_are_free(tiny_dense, name):
  assert dataclasses.replace(tiny_dense, name=name).name == name


def test_no_pickle_is_read(tmp_path):
  class Evil:
    def __reduce__(self):
      return (open, (str(tmp_path / "executed"), "w"))

  fields = [field.name for field in dataclasses.fields(HeldOut)]
  with (tmp_path / "held_out.npz").open("wb") as file:
    np.savez(file, **{name: np.array([Evil()], object) for name in fields})
  (tmp_path / "executed").unlink(missing_ok=True)
  with pytest.raises(UserError, match=r"held_out\.npz"):
    HeldOut.load(tmp_path / "held_out.npz")
  assert not (tmp_path / "executed").exists()


def test_json_that_nests_without_end_is_refused(tmp_path):
  path = tmp_path / "experiment.json"
  path.write_text("[" * 100_000)
  with pytest.raises(UserError, match="is not JSON"):
    read_experiment_file(path)
